# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A pretrained Llama becomes a CAAT-Net
#
# Converts a dense Llama for several p without training, and plots the loss against the bytes that a
# token costs.  Set `LLAMA` to a folder with `config.json`, safetensors files and a tokeniser, and
# `TEXTS` to a pattern of text files; otherwise a small Llama is trained first on the source of
# Python's standard library, which takes most of the few minutes.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import caat_jax
from caat_jax import figures

OUTPUT = Path(os.environ.get("EXAMPLES_OUTPUT", tempfile.mkdtemp()))
STEPS = os.environ.get("EXAMPLES_STEPS", "300")
TEXTS = os.environ.get("TEXTS", f"{Path(os.__file__).parent}/*.py")
SHARDS = 4


def run(*command: str) -> None:
    """A command of this project, as in a terminal."""
    print("$ python " + " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


# %% [markdown]
# ## A dense Llama
#
# At p = 1 a CAAT-Net is a Llama: the export is what `transformers` loads.

# %%
llama = os.environ.get("LLAMA")
if llama is None:
    llama = str(OUTPUT / "llama")
    small = {
        "model.embed_dim": 128,
        "model.mlp_dim": 384,
        "model.sync_factor": 1,
        "mesh.simulated_devices": 0,
        "data.sequence_length": 128,
        "train.steps": STEPS,
        "train.global_batch": 8,
        "train.checkpoint_every": STEPS,
    }
    flags = [f"--config.{field}={value}" for field, value in small.items()]
    run("train.py", "--config=configs/tiny.py", f"--workdir={OUTPUT / 'dense'}", *flags)
    run("-m", "caat_jax.huggingface", "export", str(OUTPUT / "dense"), llama)

# %%
imported = str(OUTPUT / "imported")
run("-m", "caat_jax.huggingface", "import", llama, imported, f"--tp_shards={SHARDS}")

# %% [markdown]
# ## Convert
#
# Each conversion turns the residual stream so that the directions that matter most are shared, and
# fits the weights to the dense model's streams on calibration text.

# %%
FACTORS = (0.75, 0.5, 0.25)
for p in FACTORS:
    run(
        "-m", "caat_jax.conversion", f"--workdir={imported}", f"--output={OUTPUT / f'p_{p}'}",
        f"--sync_factor={p}", f"--files={TEXTS}", "--calibration_tokens=20000",
        "--held_out_tokens=4000",
    )  # fmt: skip

# %% [markdown]
# ## Loss against bytes
#
# A token costs each device two all-reduces a layer, of which a ring sends 2·(S − 1)/S of the
# synchronised channels.

# %%
models = {1.0: caat_jax.load(imported)} | {p: caat_jax.load(OUTPUT / f"p_{p}") for p in FACTORS}
text = Path(os.__file__).read_text(encoding="utf-8")[:8000]
ids = models[1.0].tokenizer.encode(text)
length = 128
tokens = np.asarray(ids[: len(ids) // length * length]).reshape(-1, length)
losses = {p: model.loss(tokens) for p, model in models.items()}
bytes_a_token = {
    p: 4 * 2 * (SHARDS - 1) / SHARDS * np.sum(model.config.model.sync_widths)  # float32
    for p, model in models.items()
}
cut = caat_jax.load(imported, sync_factor=0.5).loss(tokens)
for p, loss in losses.items():
    print(f"p = {p}: {bytes_a_token[p]:,.0f} bytes a token, {loss:.3f} nats a token")
print(f"p = 0.5 as it is, without the conversion: {cut:.3f} nats a token")
assert losses[1.0] < losses[0.5] < cut

with figures.style():
    figure, panel = plt.subplots(figsize=(6, 4))
    panel.plot(bytes_a_token.values(), losses.values(), **figures.line(0), label="converted")
    panel.plot([bytes_a_token[0.5]], [cut], **figures.line(1), label="cut to p = 0.5 as it is")
    panel.legend()
    panel.set(title="A dense Llama, converted", ylabel="nats a token")
    panel.set_xlabel("bytes that one of S devices sends for a token, forward")
    figure.savefig(OUTPUT / "loss_by_bytes.png")
print(f"{OUTPUT}/loss_by_bytes.png")
