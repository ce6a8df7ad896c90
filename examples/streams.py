# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What the streams of a CAAT-Net hold
#
# Trains a small model with half of its channels private, looks at the streams of its shards, and
# takes the synchronisation away from one layer at a time.  Open it in
# Jupyter with jupytext, or run it as it is: `python examples/streams.py`, a few minutes on two
# cores.

# %%
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import caat_jax
from caat_jax import figures
from caat_jax.config.resolve import resolve
from caat_jax.training import loop
from configs import base

OUTPUT = Path(os.environ.get("EXAMPLES_OUTPUT", tempfile.mkdtemp()))
STEPS = int(os.environ.get("EXAMPLES_STEPS", 300))

# %% [markdown]
# ## Train
#
# A configuration is what a file of `configs/` returns.  S = 4 shards on however many devices there
# are; the text is the source of Python's standard library, in bytes.

# %%
fields = base.get_config()
fields.model.update(dict(embed_dim=128, mlp_dim=384, tp_shards=4, sync_factor=0.5))
fields.compute.scan_layers = False
fields.data.sequence_length = 128
fields.optimizer.update(dict(peak_learning_rate=3e-3, final_learning_rate=3e-4))
fields.train.update(dict(steps=STEPS, global_batch=8, eval_every=STEPS, checkpoint_every=STEPS))
steps, loss = loop.train(resolve(fields), OUTPUT / "half")
print(f"{steps} steps, validation loss {loss:.3f} nats a byte")

# %% [markdown]
# ## Look at the streams
#
# `common` is what all shards share, `private` what each keeps: here 64 channels of each.  They are
# those after the last layer, which the head reads.

# %%
model = caat_jax.load(OUTPUT / "half")
text = Path(os.__file__).read_bytes()[:8192]
tokens = np.frombuffer(text, np.uint8).astype(np.int32).reshape(-1, 128)
common, private = model.streams(tokens)
print(f"common {common.shape}, private {private.shape} (S, B, T, channels)")

# %% [markdown]
# √S keeps both at one scale at initialisation.  After training they still are within a factor of a
# few, and the private channels of two shards have little in common: no shard repeats another.

# %%
shards = jnp.reshape(private, (private.shape[0], -1, private.shape[-1]))
shards -= shards.mean(axis=1, keepdims=True)
print(f"root mean square: common {jnp.sqrt((common**2).mean()):.2f}", end=", private ")
print(", ".join(f"{jnp.sqrt((shard**2).mean()):.2f}" for shard in private))
products = np.einsum("jnc,knc->jk", shards, shards)
norms = np.sqrt(np.diag(products))
print("cosines between the shards' private streams:")
print(np.round(products / norms[:, None] / norms, 2))

# %% [markdown]
# How much of a shard's private channels follows from the common ones?  The share of their variance
# that the best linear function explains; what is left is what the shard alone knows.

# %%
inputs = np.asarray(common).reshape(-1, common.shape[-1])
inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
explained = []
for shard in np.asarray(shards):
    weights, *_ = np.linalg.lstsq(inputs, shard, rcond=None)
    explained.append(1 - ((shard - inputs @ weights) ** 2).sum() / (shard**2).sum())
print("explained by the common channels: " + ", ".join(f"{share:.0%}" for share in explained))
assert all(0 < share < 1 for share in explained)

# %% [markdown]
# ## Change p of one layer
#
# The same parameters with another p are another function.  Here one layer at a time has none of its
# channels synchronised, without any training to get used to it.

# %%
layers = model.config.model.layers
losses = [model.loss(tokens)]
for layer in range(layers):
    factors = [0.0 if number == layer else 0.5 for number in range(layers)]
    losses.append(caat_jax.load(OUTPUT / "half", sync_factor=factors).loss(tokens))
rises = [loss - losses[0] for loss in losses[1:]]

with figures.style():
    figure, panel = plt.subplots(figsize=(6, 3.5))
    panel.bar(range(layers), rises, color=figures.COLOURS[0])
    panel.set_xticks(range(layers))
    panel.set(title="Nothing synchronised in one layer", xlabel="layer", ylabel="nats a byte more")
    figure.savefig(OUTPUT / "one_layer.png")
print(f"nats a byte more: {', '.join(f'{rise:.3f}' for rise in rises)}; {OUTPUT}/one_layer.png")
