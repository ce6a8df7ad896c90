"""Names of places, which every operation of a compiled program carries.

`caat_jax.communication` and `caat_jax.step_time` sort what they count by them.
"""

EMBEDDING, LAYERS, HEAD_AND_LOSS = "embedding", "layers", "head_and_loss"

# What a fused kernel computes, where there is one (`attention.py`).
ATTENTION_SCOPE = "attend"
