"""Trains a grid of configurations, and reports what each setting costs.

`training` and `communication` come before it.
"""
