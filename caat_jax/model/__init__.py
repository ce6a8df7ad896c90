"""The method and the decoder around it: what runs on one device's shards, inside `shard_map`.

Start with `partial_sync.py`.  `devices` and `config` come before it.
"""
