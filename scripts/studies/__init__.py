"""Studies behind docs/: each is one file and one command, `scripts/study NAME`; none of them is in the wheel."""
