"""The compiled training step, the loop around it, the optimizer, validation and metrics.

`checkpoints` and `data` come before it.
"""
