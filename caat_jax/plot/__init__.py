"""Runs side by side as a picture.

`training`, whose metrics it reads, and `figures` come before it; nothing imports it.
"""
