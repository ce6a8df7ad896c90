"""Tensor parallelism that synchronises only part of its activations (arXiv:2506.19645).

`caat_jax.load(WORKDIR)` is the way in for notebooks and scripts; `model/partial_sync.py` is the
method.
"""


def __getattr__(name: str) -> object:
    """`load`, imported when it is asked for: commands start without what it needs."""
    if name == "load":
        from caat_jax.loaded import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
