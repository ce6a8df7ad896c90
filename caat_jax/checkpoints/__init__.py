"""Saving and restoring on any mesh: checkpoints, their digests, the folder of a run, its model.

`model` and `data` come before it; knows nothing of training.
"""
