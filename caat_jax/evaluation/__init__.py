"""What `eval.py` finds out: the loss of the validation split, and lm-evaluation-harness tasks.

`training` and `inference` come before it.
"""
