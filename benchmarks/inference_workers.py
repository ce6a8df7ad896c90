"""Workers of `inference.py`: this project on simulated devices or on one, and transformers.

python -m benchmarks.inference_workers caat DEVICES P BATCH LENGTH NEW_TOKENS
python -m benchmarks.inference_workers torch BATCH LENGTH NEW_TOKENS

A step is one greedy generation of NEW_TOKENS for BATCH prompts of LENGTH; with NEW_TOKENS = 1 it is
the prefill.  The peers' Python needs torch and transformers, and none of this project's packages.
"""

import sys
from collections.abc import Callable

import numpy as np

from benchmarks import workers as sizes


def build_caat(
    devices: int, p: float, batch: int, length: int, new_tokens: int
) -> tuple[Callable[[], float], str]:
    """`caat_jax.decoding.Generator` on a mesh of `model` = `devices`."""
    import jax

    from benchmarks import our_systems
    from caat_jax.decoding import Generator

    programs, _ = our_systems.programs_and_batch(devices, p, length + new_tokens)
    parameters = programs.initial_state().parameters
    generator = Generator(programs.config, programs.mesh, parameters)
    prompts = _prompts(batch, length).tolist()

    def step() -> float:
        return float(generator.generate(prompts, max_new_tokens=new_tokens)[0][-1])

    return step, f"jax {jax.__version__}"


def build_torch(batch: int, length: int, new_tokens: int) -> tuple[Callable[[], float], str]:
    """A Llama of `transformers`, its dynamic cache and its own loop for it, two threads."""
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=sizes.EMBED_DIM,
            intermediate_size=sizes.MLP_DIM,
            num_hidden_layers=sizes.LAYERS,
            num_attention_heads=sizes.HEADS,
            vocab_size=sizes.VOCAB_SIZE,
        )
    ).eval()
    prompts = torch.from_numpy(_prompts(batch, length)).long()

    # Not `model.generate`, which takes longer: only what the model itself needs.
    @torch.inference_mode()
    def step() -> float:
        result = model(prompts, use_cache=True, logits_to_keep=1)
        for _ in range(new_tokens - 1):
            tokens = result.logits[:, -1:].argmax(-1)
            result = model(tokens, past_key_values=result.past_key_values, use_cache=True)
        return float(result.logits[:, -1].argmax(-1)[0])

    return step, f"torch {torch.__version__}, transformers {transformers.__version__}"


def _prompts(batch: int, length: int) -> np.ndarray:
    shape = batch, length
    return np.random.default_rng(0).integers(sizes.VOCAB_SIZE, size=shape, dtype=np.int32)


if __name__ == "__main__":
    numbers = [int(n) for n in sys.argv[-3:]]
    if sys.argv[1] == "torch":
        sizes.serve(lambda: build_torch(*numbers))
    else:
        sizes.serve(lambda: build_caat(int(sys.argv[2]), float(sys.argv[3]), *numbers))
