"""From text to batches: corpora (TFDS), tokenisers, the token cache, the loader (Grain).

`config` and `devices` come before it; knows nothing of models.
"""
