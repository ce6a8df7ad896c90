"""The sizes of what `links.py` measures, and this project's configuration of them."""

import ast
import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Generation:
    """A batch of prompts and the length of its continuation; parts are named after `prompts`."""

    batch: int
    prompt_length: int
    new_tokens: int

    @property
    def prompts(self) -> str:
        return f"{self.batch}x{self.prompt_length}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the model and of the workloads; float32."""

    layers: int
    embed_dim: int
    heads: int
    mlp_dim: int
    vocab_size: int
    train_batch: int  # 0: nothing is trained
    train_length: int
    generations: tuple[Generation, ...]
    scan_layers: bool = False  # as `compute.scan_layers`

    @classmethod
    def from_json(cls, text: str) -> "Sizes":
        """The inverse of `json.dumps(dataclasses.asdict(sizes))`."""
        fields = json.loads(text)
        generations = tuple(Generation(**case) for case in fields.pop("generations"))
        return cls(generations=generations, **fields)


def config_of(factors: str, hosts: int, sizes: Sizes, wire: str = "float32") -> Any:
    """The configuration for some factors, on a mesh with one device of each host."""
    # Here, since the torch peer's Python has neither.
    from caat_jax.config.resolve import resolve
    from configs import base

    config = base.get_config()
    config.model.update(
        layers=sizes.layers,
        embed_dim=sizes.embed_dim,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        mlp_dim=sizes.mlp_dim,
        vocab_size=sizes.vocab_size,
        tp_shards=hosts,
    )
    chosen = ast.literal_eval(factors)
    if isinstance(chosen, tuple):
        config.model.sync_factor_per_layer = chosen
    else:
        config.model.sync_factor = float(chosen)
    config.compute.update(
        scan_layers=sizes.scan_layers, forward_wire_dtype=wire, backward_wire_dtype=wire
    )
    config.mesh.update(data=1, fsdp=1, model=hosts)
    config.train.global_batch = max(sizes.train_batch, 1)
    longest = max((g.prompt_length + g.new_tokens for g in sizes.generations), default=0)
    config.data.sequence_length = max(sizes.train_length, longest)
    return resolve(config)
