"""Runs in buckets: objects, a run's mirror on a local disk, and the lease of the one that writes.

`files`, `config` and `errors` come before it; knows nothing of what the files are.
"""
