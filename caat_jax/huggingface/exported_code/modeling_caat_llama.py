"""A CAAT-Net for `transformers`: a Llama whose activations are only partly synchronised.

Written by caat_jax (Apache-2.0) beside the weights of a model with p < 1.  It computes on one
device what S tensor-parallel shards compute together (arXiv:2506.19645): each shard has a residual
stream; a sublayer's output is summed over shards in its first D_s channels only, the others stay
the shard's own, times √S; each shard's rows of the output matrix see that shard's stream.  The
weights have a dense Llama's names and shapes: shard j owns the j-th of S equal parts of the heads,
of the MLP columns and of the vocabulary.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

All else is the Llama of the installed `transformers`: its modules take the S streams side by side,
[B, T, S·D], and only the embedding, the norms and the linear layers know that they are S.

Axis letters: S shards, B batch, T tokens, D residual width, n columns of one shard.
"""

import functools
import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import TransformersKwargs


class CaatLlamaConfig(LlamaConfig):
    """A Llama's configuration, and how it is split.

    `tp_shards` is S; `sync_widths` has the pair D_s of (attention, MLP) for every layer; the last
    `vocab_padding` ids are none, and their logits −∞.
    """

    model_type = "caat_llama"
    # Plans for `transformers`' own tensor and pipeline parallelism, which is dense.
    base_model_tp_plan = None
    base_model_pp_plan = None
    tp_shards: int = 1
    sync_widths: list | None = None
    vocab_padding: int = 0


class RepeatedEmbedding(nn.Embedding):
    """Every stream starts as the embedding: tokens [B, T] to [B, T, S·D]."""

    shards: int

    def forward(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens_BxT).repeat(1, 1, self.shards)


class NormOfStreams(LlamaRMSNorm):
    """RMSNorm of each stream, with one scale for all: [B, T, S·D] to the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, (-1, len(self.weight)))).flatten(-2)


class ColumnParallel(nn.Linear):
    """Each stream times its shard's rows of the weight [S·n, D]: [B, T, S·D] to [B, T, S·n]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BxTxSxD = x.unflatten(-1, (-1, self.in_features))
        weight_SxnxD = self.weight.unflatten(0, (x_BxTxSxD.shape[-2], -1))
        return torch.einsum("btsd,snd->btsn", x_BxTxSxD, weight_SxnxD).flatten(-2)


class PaddedHead(ColumnParallel):
    """Logits, those of the last `padding` ids −∞."""

    padding: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        is_padding = torch.arange(self.out_features, device=x.device) >= (
            self.out_features - self.padding
        )
        return logits.masked_fill(is_padding, -math.inf)


class SharedColumnParallel(ColumnParallel):
    """The same of fewer key or value heads than shards: consecutive shards share a head, of which
    each computes its own keys or values."""

    shards: int
    head_dim: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BxTxSxD = x.unflatten(-1, (self.shards, -1))
        weight_KxnxD = self.weight.unflatten(0, (-1, self.head_dim))
        weight_SxnxD = weight_KxnxD.repeat_interleave(self.shards // len(weight_KxnxD), dim=0)
        return torch.einsum("btsd,snd->btsn", x_BxTxSxD, weight_SxnxD).flatten(-2)


class PartialRowParallel(nn.Linear):
    """Each shard's activations times its columns of the weight [D, S·n], then the partial
    channel-reduce: the first `sync_width` channels summed over shards, the others times √S.

    [B, T, S·n] to [B, T, S·D].
    """

    shards: int
    sync_width: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BxTxSxn, weight_DxSxn = (a.unflatten(-1, (self.shards, -1)) for a in (x, self.weight))
        y_BxTxSxD = torch.einsum("btsn,dsn->btsd", x_BxTxSxn, weight_DxSxn)
        shared = y_BxTxSxD[..., : self.sync_width].sum(dim=-2, keepdim=True)
        private = math.sqrt(self.shards) * y_BxTxSxD[..., self.sync_width :]
        return torch.cat([shared.expand(*private.shape[:-1], -1), private], dim=-1).flatten(-2)


def turn_into(kind: type[nn.Module], *modules: nn.Module, **attributes: int) -> None:
    """Makes the modules, with the parameters that they have, ones of a subclass."""
    for module in modules:
        module.__class__ = kind
        for name, value in attributes.items():
            setattr(module, name, value)


# What a Llama's forward takes in this release.
ARGUMENTS = {"return_dict", "ignore_index", "shift_labels", *TransformersKwargs.__annotations__}
ARGUMENTS |= inspect.signature(LlamaForCausalLM.forward).parameters.keys() - {"kwargs"}
CACHE = "cache" if "cache" in ARGUMENTS else "past_key_values"


class CaatLlamaForCausalLM(LlamaForCausalLM):
    """Logits [B, T, V], and the mean cross-entropy of the next tokens where `labels` are given."""

    config_class = CaatLlamaConfig
    _tp_plan = None
    _pp_plan = None

    def __init__(self, config: CaatLlamaConfig):
        super().__init__(config)
        shards = config.tp_shards
        turn_into(RepeatedEmbedding, self.model.embed_tokens, shards=shards)
        for layer, widths in zip(self.model.layers, config.sync_widths, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            turn_into(NormOfStreams, layer.input_layernorm, layer.post_attention_layernorm)
            turn_into(ColumnParallel, attention.q_proj)
            if config.num_key_value_heads < shards:
                head_dim = attention.head_dim
                attention.num_key_value_groups = config.num_attention_heads // shards
                turn_into(
                    SharedColumnParallel,
                    attention.k_proj,
                    attention.v_proj,
                    shards=shards,
                    head_dim=head_dim,
                )
            else:
                turn_into(ColumnParallel, attention.k_proj, attention.v_proj)
            turn_into(ColumnParallel, mlp.gate_proj, mlp.up_proj)
            for output, width in zip((attention.o_proj, mlp.down_proj), widths, strict=True):
                turn_into(PartialRowParallel, output, shards=shards, sync_width=width)
        turn_into(NormOfStreams, self.model.norm)
        turn_into(PaddedHead, self.lm_head, padding=config.vocab_padding)

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Releases differ in the cache's name, and a Llama lets unknown arguments pass unread.
        for name in {"cache", "past_key_values"} & kwargs.keys():
            kwargs[CACHE] = kwargs.pop(name)
        unknown = kwargs.keys() - ARGUMENTS
        if unknown:
            raise TypeError(f"a CAAT-Net's forward takes no {', '.join(sorted(unknown))}")
        return super().forward(*args, **kwargs)

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Embedding:
        """Refuses: shards own equal parts of the vocabulary; another size would move them all."""
        raise NotImplementedError("a CAAT-Net's vocabulary cannot be resized")
