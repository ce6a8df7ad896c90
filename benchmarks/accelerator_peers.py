"""`transformers` on PyTorch at the sizes of `accelerator_stages.py`, on a GPU if there is one."""

import importlib.util
from collections.abc import Callable
from typing import Any

from caat_jax.config.sections import Config


def missing() -> str | None:
    """Why there is nothing to compare with, if so."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


def training_steps(config: Config, *, compiled: bool) -> dict[str, Callable[[], None]]:
    """Training steps in bfloat16 with float32 weights and fused AdamW: eager, and compiled."""
    import torch

    model, version, where = _llama(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    shape = config.train.global_batch, config.data.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, device=where)

    def step(forward: Callable) -> None:
        optimizer.zero_grad()
        with torch.autocast(where, torch.bfloat16):
            logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if where == "cuda":
            torch.cuda.synchronize()

    steps = {f"{version}, eager": lambda: step(model)}
    if compiled:
        faster = torch.compile(model)
        steps[f"{version}, compiled"] = lambda: step(faster)
    return steps


def generators(config: Config, *, compiled: bool) -> dict[str, Callable[[int, int, int], None]]:
    """Greedy generation by (batch, prompt, new tokens), bfloat16 weights, by kind of cache."""
    import torch

    model, version, where = _llama(config)
    model = model.to(torch.bfloat16).eval()
    caches = {"dynamic cache": {}}
    if compiled:
        caches["static cache, compiled"] = dict(cache_implementation="static")

    def generate(batch: int, prompt: int, new_tokens: int, options: dict) -> None:
        tokens = torch.ones((batch, prompt), dtype=torch.long, device=where)
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **options,
        ).cpu()

    return {
        f"{version}, {name}": lambda *sizes, options=options: generate(*sizes, options)
        for name, options in caches.items()
    }


def _llama(config: Config) -> tuple[Any, str, str]:
    """A model of the size of `config`'s, its versions, and where it is."""
    import torch
    import transformers

    arch = config.model
    llama = transformers.LlamaConfig(
        hidden_size=arch.embed_dim,
        intermediate_size=arch.mlp_dim,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        vocab_size=arch.vocab_size,
        max_position_embeddings=2 * config.data.sequence_length,
        attn_implementation="sdpa",
    )
    where = "cuda" if torch.cuda.is_available() else "cpu"
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return transformers.LlamaForCausalLM(llama).to(where), version, where
