"""Import from, and export to, Hugging Face's format: one table of tensors, read both ways.

`checkpoints` and `training` come before it.
"""
