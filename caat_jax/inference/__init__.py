"""Prefill and decode, sampling, and from text to text.

`training` comes before it, which it does not need; `evaluation` may import it.
"""
