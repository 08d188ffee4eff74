"""The `skipit` command: one file per verb, with its arguments, its run and its table side by side."""
