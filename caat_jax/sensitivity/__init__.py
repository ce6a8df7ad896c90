"""What cutting each sublayer's synchronisation costs, and the best factors for a budget.

`training` and `checkpoints` come before it.
"""
