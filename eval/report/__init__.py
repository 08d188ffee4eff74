"""The report of an evaluation: one self-contained page in HTML, made of the numbers in eval.json alone."""
