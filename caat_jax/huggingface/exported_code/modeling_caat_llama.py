"""A CAAT-Net for `transformers`: a Llama whose activations are only partly synchronised.

Written by caat_jax (Apache-2.0) beside the weights of a model with p < 1.  It computes on one
device what S tensor-parallel shards compute together (arXiv:2506.19645): each shard has a residual
stream; a sublayer's output is summed over shards in its first D_s channels only, the others stay
the shard's own, times √S; each shard's rows of the output matrix see that shard's stream.  The
weights have a dense Llama's names and shapes: shard j owns the j-th of S equal parts of the heads,
of the MLP columns and of the vocabulary.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Axis letters: S shards, B batch, T queries, U keys, D residual width, h width of a head, n columns
of one shard.
"""

import math

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class CaatLlamaConfig(LlamaConfig):
    """A Llama's configuration, and how it is split.

    `tp_shards` is S; `sync_widths` has the pair D_s of (attention, MLP) for every layer.
    """

    model_type = "caat_llama"
    tp_shards: int = 1
    sync_widths: list | None = None


def columns_of_shards(x_SBTD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[S, B, T, n]: each shard's stream times its part of the rows of `weight` [S·n, D]."""
    shards, width = x_SBTD.shape[0], x_SBTD.shape[-1]
    return torch.einsum("sbtd,snd->sbtn", x_SBTD, weight.view(shards, -1, width))


def outputs_of_shards(x_BTSn: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[S, B, T, D]: each shard's activations times its part of the columns of `weight` [D, S·n]."""
    shards = x_BTSn.shape[2]
    return torch.einsum("btsn,dsn->sbtd", x_BTSn, weight.view(weight.shape[0], shards, -1))


def partial_channel_reduce(y_SBTD: torch.Tensor, sync_width: int) -> torch.Tensor:
    """The first `sync_width` channels summed over shards, the others times √S."""
    shared = y_SBTD[..., :sync_width].sum(dim=0, keepdim=True)
    private = math.sqrt(len(y_SBTD)) * y_SBTD[..., sync_width:]
    return torch.cat([shared.expand(len(y_SBTD), -1, -1, -1), private], dim=-1)


def rotary_frequencies(config: CaatLlamaConfig, device: torch.device) -> torch.Tensor:
    """Radians a token, float32 [h/2], by which each pair of channels turns."""
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = rope["rope_theta"] ** -exponents
    if rope["rope_type"] == "default":
        return frequencies
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of [B, heads, T, h]: channel i turns with channel i + h/2."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class CaatLlamaRMSNorm(nn.Module):
    """RMSNorm of every shard's own stream, with one scale for all."""

    def __init__(self, config: CaatLlamaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.rms_norm_eps

    def forward(self, x_SBTD: torch.Tensor) -> torch.Tensor:
        x = x_SBTD.float()
        normalised = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.epsilon)
        return self.weight * normalised.to(x_SBTD.dtype)


class CaatLlamaAttention(nn.Module):
    """Causal self-attention; its output before the partial channel-reduce, [S, B, T, D]."""

    def __init__(self, config: CaatLlamaConfig, layer: int):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.layer, self.queries_per_key = config.head_dim, layer, heads // kv_heads
        width = config.hidden_size
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x_SBTD, rotation, mask_BxTU, cache) -> torch.Tensor:
        shards, batch, length, _ = x_SBTD.shape
        query, key, value = (
            columns_of_shards(x_SBTD, projection.weight)
            .permute(1, 2, 0, 3)
            .reshape(batch, length, -1, self.head_dim)
            .transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(self.queries_per_key, dim=1),
            value.repeat_interleave(self.queries_per_key, dim=1),
            attn_mask=mask_BxTU,
        )
        attended = attended.transpose(1, 2).reshape(batch, length, shards, -1)
        return outputs_of_shards(attended, self.o_proj.weight)


class CaatLlamaMLP(nn.Module):
    """SwiGLU; its output before the partial channel-reduce, [S, B, T, D]."""

    def __init__(self, config: CaatLlamaConfig):
        super().__init__()
        width, columns = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, columns, bias=False)
        self.up_proj = nn.Linear(width, columns, bias=False)
        self.down_proj = nn.Linear(columns, width, bias=False)

    def forward(self, x_SBTD: torch.Tensor) -> torch.Tensor:
        gate = columns_of_shards(x_SBTD, self.gate_proj.weight)
        up = columns_of_shards(x_SBTD, self.up_proj.weight)
        activated = (nn.functional.silu(gate) * up).permute(1, 2, 0, 3)
        return outputs_of_shards(activated, self.down_proj.weight)


class CaatLlamaLayer(nn.Module):
    """Attention, then MLP, each with its norm, partial channel-reduce and residual connection."""

    def __init__(self, config: CaatLlamaConfig, layer: int):
        super().__init__()
        self.self_attn = CaatLlamaAttention(config, layer)
        self.mlp = CaatLlamaMLP(config)
        self.input_layernorm = CaatLlamaRMSNorm(config)
        self.post_attention_layernorm = CaatLlamaRMSNorm(config)
        self.attention_width, self.mlp_width = config.sync_widths[layer]

    def forward(self, x_SBTD, rotation, mask_BxTU, cache) -> torch.Tensor:
        y = self.self_attn(self.input_layernorm(x_SBTD), rotation, mask_BxTU, cache)
        x_SBTD = x_SBTD + partial_channel_reduce(y, self.attention_width)
        y = self.mlp(self.post_attention_layernorm(x_SBTD))
        return x_SBTD + partial_channel_reduce(y, self.mlp_width)


class CaatLlamaModel(nn.Module):
    """Embedding, layers and final norm: the shards' normalised streams, [S, B, T, D]."""

    def __init__(self, config: CaatLlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            CaatLlamaLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = CaatLlamaRMSNorm(config)

    def forward(self, embedded_BTD, attention_mask, position_ids, cache) -> torch.Tensor:
        length, device = embedded_BTD.shape[1], embedded_BTD.device
        past = cache.get_seq_length() if cache is not None else 0
        slots_T = past + torch.arange(length, device=device)
        positions_xT = slots_T[None] if position_ids is None else position_ids
        angles = positions_xT[:, None, :, None] * rotary_frequencies(self.config, device)
        rotation = torch.cos(angles), torch.sin(angles)
        visible = slots_T[:, None] >= torch.arange(past + length, device=device)
        visible = visible[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None, :]
        # Not -inf: a query that sees nothing, left padding, would become nan.
        mask = torch.zeros(visible.shape, dtype=embedded_BTD.dtype, device=device)
        mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
        x_SBTD = embedded_BTD.expand(self.config.tp_shards, -1, -1, -1)
        for layer in self.layers:
            x_SBTD = layer(x_SBTD, rotation, mask, cache)
        return self.norm(x_SBTD)


class CaatLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits [B, T, V], and the mean cross-entropy of the next tokens where `labels` are given."""

    config_class = CaatLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ("CaatLlamaLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CaatLlamaConfig):
        super().__init__(config)
        self.model = CaatLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **loss_arguments,
    ) -> CausalLMOutputWithPast:
        """As a Llama's of `transformers`.

        Args:
          input_ids: [B, T]; or inputs_embeds [B, T, D].
          attention_mask: [B, U], 0 where a key is padding.
          position_ids: [B, T]; by default they count from the end of the cache.
          past_key_values: keys and values of the tokens before these.
          labels: [B, T], -100 where not counted; shifted here.
          use_cache: whether to return a cache; the configuration's choice by default.
          logits_to_keep: of how many last positions, or of which, to return logits; 0: of all.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("a CAAT-Net takes an attention_mask [B, U], and no static cache")
        if use_cache if use_cache is not None else self.config.use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
        embedded = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x_SBTD = self.model(embedded, attention_mask, position_ids, past_key_values)
        if isinstance(logits_to_keep, torch.Tensor):
            x_SBTD = x_SBTD[:, :, logits_to_keep]
        elif logits_to_keep:
            x_SBTD = x_SBTD[:, :, -logits_to_keep:]
        # A shard's rows of the output matrix see that shard's stream.
        logits = columns_of_shards(x_SBTD, self.lm_head.weight).permute(1, 2, 0, 3).flatten(2)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
