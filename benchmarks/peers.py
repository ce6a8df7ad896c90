"""Workers of other projects: transformers on PyTorch, and nanodo on JAX.

python -m benchmarks.peers torch eager|compile eager|sdpa
python -m benchmarks.peers nanodo DEVICES CHECKOUT

Started by `step_time.py` with the peers' own Python, which needs no dependency of this project:
    pip install torch transformers              (for PyTorch; compiling needs a C++ compiler)
    pip install jax flax optax orbax-checkpoint grain ml_collections tensorflow_datasets \\
        sentencepiece array_record              (for nanodo, and a checkout of it)
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import workers as sizes

# nanodo's MLP has two matrices instead of three; this width makes its products as large.
NANODO_MLP_DIM = sizes.MLP_DIM * 3 // 2


def build_torch(mode: str, attention: str) -> tuple[Callable[[], float], str]:
    """A Llama of `transformers`, fused AdamW, two threads."""
    import torch

    model, versions = torch_llama(attn_implementation=attention, use_cache=False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=sizes.LEARNING_RATE,
        betas=sizes.BETAS,
        eps=sizes.EPSILON,
        weight_decay=sizes.WEIGHT_DECAY,
        fused=True,
    )
    tokens = torch.from_numpy(_tokens(sizes.LENGTH + 1)).long()
    forward = torch.compile(model) if mode == "compile" else model

    def step() -> float:
        optimizer.zero_grad()
        logits = forward(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), sizes.CLIP_NORM)
        optimizer.step()
        return loss.item()

    return step, versions


def torch_llama(**options: Any) -> tuple[Any, str]:
    """A `transformers.LlamaForCausalLM` with these options, on two threads, and its versions."""
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=sizes.EMBED_DIM,
        intermediate_size=sizes.MLP_DIM,
        num_hidden_layers=sizes.LAYERS,
        num_attention_heads=sizes.HEADS,
        vocab_size=sizes.VOCAB_SIZE,
        **options,
    )
    products = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    build = f"{products}, {torch.backends.cpu.get_cpu_capability()}"
    versions = f"torch {torch.__version__} ({build}), transformers {transformers.__version__}"
    return transformers.LlamaForCausalLM(config), versions


def build_nanodo(devices: int, checkout: str) -> tuple[Callable[[], float], str]:
    """nanodo's own model, optimizer, shardings (FSDP) and training step."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    sys.path.insert(0, checkout)
    # Its logging and progress hooks would need TensorFlow; a training step uses neither.
    sys.modules["clu"] = mock.MagicMock()
    config = importlib.import_module("nanodo.configs.default").get_config()
    nanodo = importlib.import_module("nanodo.train")
    config.model.update(
        D=sizes.EMBED_DIM,
        H=sizes.HEADS,
        L=sizes.LENGTH,
        N=sizes.LAYERS,
        F=NANODO_MLP_DIM,
        dtype="float32",
    )
    config.opt.peak_learning_rate = sizes.LEARNING_RATE
    config.opt.weight_decay = sizes.WEIGHT_DECAY
    config.opt.clip_by_global_norm = sizes.CLIP_NORM
    config.log_internal_metrics = False
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    model, make_loss = nanodo.model_factory.get_model_and_loss(config, sizes.VOCAB_SIZE)
    shardings, state = nanodo._init_train_state(config, model, jax.random.PRNGKey(0), mesh)
    trainer = nanodo.Trainer(config, state, mesh, shardings, make_loss)
    tokens = _tokens(sizes.LENGTH)

    def step() -> float:
        metrics = trainer.do_step(1, tokens)
        jax.block_until_ready((trainer.state, metrics))
        return float(metrics["train_loss"])

    return step, f"jax {jax.__version__}"


def _tokens(length: int) -> np.ndarray:
    shape = sizes.BATCH, length
    # nanodo treats 0 as padding.
    return np.random.default_rng(0).integers(1, sizes.VOCAB_SIZE, size=shape, dtype=np.int32)


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        sizes.serve(lambda: build_torch(sys.argv[2], sys.argv[3]))
    else:
        sizes.serve(lambda: build_nanodo(int(sys.argv[2]), sys.argv[3]))
