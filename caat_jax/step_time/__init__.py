"""Predicted step times of chips that need not be there.

`communication`, which counts what a step does, comes before it.
"""
