"""Workers of `inference.py`: this project on simulated devices or one device, and transformers.

python -m benchmarks.inference_workers caat DEVICES P BATCH LENGTH NEW_TOKENS
python -m benchmarks.inference_workers torch dynamic|static BATCH LENGTH NEW_TOKENS

A step is one greedy generation of NEW_TOKENS tokens for each of BATCH prompts of LENGTH tokens;
with NEW_TOKENS = 1 it is the prefill.  The torch worker needs torch and transformers, but none of
this project's dependencies.
"""

import sys
from collections.abc import Callable

import numpy as np

from benchmarks import peers
from benchmarks import workers as sizes


def build_caat(
    devices: int, p: float, batch: int, length: int, new_tokens: int
) -> tuple[Callable[[], float], str]:
    """`caat_jax.inference.generator.Generator` on a mesh of `model` = `devices`."""
    import jax

    from benchmarks import our_systems
    from caat_jax.inference.generator import Generator

    programs, _ = our_systems.programs_and_batch(devices, p, length + new_tokens)
    parameters = programs.initial_state().parameters
    generator = Generator(programs.config, programs.mesh, parameters)
    prompts = _prompts(batch, length).tolist()

    def step() -> float:
        return float(generator.generate(prompts, max_new_tokens=new_tokens)[0][-1])

    return step, f"jax {jax.__version__}"


def build_torch(
    cache_kind: str, batch: int, length: int, new_tokens: int
) -> tuple[Callable[[], float], str]:
    """A Llama of `transformers`, two threads.

    Args:
      cache_kind: "dynamic" for the growing cache, without compilation; "static" for a cache of
        fixed length, with prefill and decode each compiled.
      batch: number of prompts.
      length: tokens in each prompt.
      new_tokens: tokens to generate for each prompt.
    """
    import torch
    import transformers

    model, versions = peers.torch_llama()
    model.eval()
    prompts = torch.from_numpy(_prompts(batch, length)).long()

    def choose(tokens: torch.Tensor, cache: transformers.Cache) -> torch.Tensor:
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    prefill = decode = choose
    if cache_kind == "static":
        cache = transformers.StaticCache(model.config, max_cache_len=length + new_tokens)
        with torch.inference_mode():
            choose(prompts, cache)  # allocates the cache, which compiled code must not do
        prefill, decode = (torch.compile(choose, dynamic=False, fullgraph=True) for _ in range(2))

    # Only what the model itself needs: `model.generate` takes longer.
    @torch.inference_mode()
    def step() -> float:
        if cache_kind == "static":
            cache.reset()
            used = cache
        else:
            used = transformers.DynamicCache(config=model.config)
        tokens = prefill(prompts, used)
        for _ in range(new_tokens - 1):
            tokens = decode(tokens, used)
        return float(tokens[0])

    return step, versions


def _prompts(batch: int, length: int) -> np.ndarray:
    shape = batch, length
    return np.random.default_rng(0).integers(sizes.VOCAB_SIZE, size=shape, dtype=np.int32)


if __name__ == "__main__":
    numbers = [int(n) for n in sys.argv[-3:]]
    if sys.argv[1] == "torch":
        sizes.serve(lambda: build_torch(sys.argv[2], *numbers))
    else:
        sizes.serve(lambda: build_caat(int(sys.argv[2]), float(sys.argv[3]), *numbers))
