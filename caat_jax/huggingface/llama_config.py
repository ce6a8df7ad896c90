"""A Llama's `config.json` in Hugging Face's format: to `config.model` fields, and back."""

import json
from pathlib import Path
from typing import Any

from caat_jax.config.architecture import Architecture
from caat_jax.errors import InputError
from caat_jax.files import read_json

FILE = "config.json"

# Fields that must be absent or have these values, the only ones that the decoder supports.
_ONLY = {
    "model_type": "llama",
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
# model.layers and so on, by their names in config.json; these must be there.
_SIZES = {
    "layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
# `transformers`' values where config.json has none.
_DEFAULT_EPSILON, _DEFAULT_ROPE_BASE, _DEFAULT_LENGTH = 1e-6, 10_000.0, 2048

# Keys of the rotary embedding's dictionary, by rope_type.
_LLAMA3 = {
    "rope_scaling_factor": "factor",
    "rope_scaling_low_turns": "low_freq_factor",
    "rope_scaling_high_turns": "high_freq_factor",
    "rope_scaling_original_length": "original_max_position_embeddings",
}
_ROPE_TYPES = ("default", "llama3")


def read(folder: Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`.

    Raises:
      InputError: there is none, or it is not a JSON object.
    """
    if not (folder / FILE).exists():
        raise InputError(f"{folder} has no {FILE}; give a folder with one and safetensors files")
    return read_json(folder / FILE, dict)


def model_fields(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The `config.model` fields that a Llama's `config.json` says, tp_shards and p left out.

    Args:
      fields: of the file.
      path: the file's, for messages.

    Raises:
      InputError: it is not a Llama, or has something that the decoder here does not have.
    """
    if "model_type" not in fields:
        raise InputError(f"{path} has no model_type; it must be llama")
    for key, allowed in _ONLY.items():
        value = fields.get(key)
        if value is not None and value not in (allowed if type(allowed) is tuple else [allowed]):
            raise InputError(
                f"{path}: {key}={json.dumps(value)} is not supported; {_hint(allowed)}"
            )
    model: dict[str, Any] = {name: _size(fields, key, path) for name, key in _SIZES.items()}
    model["kv_heads"] = model["heads"]
    if fields.get("num_key_value_heads") is not None:
        model["kv_heads"] = _size(fields, "num_key_value_heads", path)
    if fields.get("head_dim") is not None:
        model["head_dim"] = _size(fields, "head_dim", path)
    model["tied_head"] = bool(fields.get("tie_word_embeddings", False))
    model["norm_epsilon"] = _number(fields, "rms_norm_eps", _DEFAULT_EPSILON, path)
    return model | _rope_fields(fields, path)


def max_length(fields: dict[str, Any], path: Path) -> int:
    """The most positions that the model was made for."""
    if fields.get("max_position_embeddings") is None:
        return _DEFAULT_LENGTH
    return _size(fields, "max_position_embeddings", path)


def to_fields(arch: Architecture, *, dtype: str, max_length: int) -> dict[str, Any]:
    """A `config.json` without token ids.

    Where p < 1 it is that of `exported_code`, otherwise a plain Llama's.  The rotary embedding is
    there twice: as `transformers` 4 reads it and as 5 does.

    Args:
      arch: the architecture.
      dtype: the tensors'.
      max_length: the most positions that the model is made for.
    """
    scaling = None
    if arch.rope_scaling_factor != 1:
        scaling = {key: getattr(arch, name) for name, key in _LLAMA3.items()}
        scaling["rope_type"] = "llama3"
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": arch.embed_dim,
        "intermediate_size": arch.mlp_dim,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "tie_word_embeddings": arch.tied_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": arch.norm_epsilon,
        "max_position_embeddings": max_length,
        "rope_theta": arch.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": arch.rope_base},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if arch.is_dense:
        return fields
    return fields | {
        "architectures": ["CaatLlamaForCausalLM"],
        "model_type": "caat_llama",
        "auto_map": {
            "AutoConfig": "modeling_caat_llama.CaatLlamaConfig",
            "AutoModelForCausalLM": "modeling_caat_llama.CaatLlamaForCausalLM",
        },
        "tp_shards": arch.tp_shards,
        "sync_widths": arch.sync_widths,
        "vocab_padding": arch.vocab_padding,
    }


def _rope_fields(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    # As `transformers` 5 merges the older keys and the newer dictionary.
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling={json.dumps(rope)} must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3.values()}
    strange = [key for key in rope if key not in known]
    if kind not in _ROPE_TYPES or (strange and kind == "llama3"):
        raise InputError(
            f"{path}: the rotary embedding {json.dumps(rope)} is not supported; rope_type must be"
            f" one of {', '.join(_ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise InputError(
            f"{path}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported;"
            f" {_hint(1.0)}"
        )
    base = _number(fields, "rope_theta", _DEFAULT_ROPE_BASE, path)
    model: dict[str, Any] = {"rope_base": _number(rope, "rope_theta", base, path)}
    if kind == "default":
        return model
    rope = {"original_max_position_embeddings": max_length(fields, path)} | rope
    for name, key in _LLAMA3.items():
        if rope.get(key) is None:
            raise InputError(f"{path}: rope_type llama3 needs {key}")
        model[name] = _number(rope, key, 0.0, path)
    length = _LLAMA3["rope_scaling_original_length"]
    return model | {"rope_scaling_original_length": _size(rope, length, path)}


def _size(fields: dict[str, Any], key: str, path: Path) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key}={json.dumps(value)} must be a whole number above 0")
    return value


def _number(fields: dict[str, Any], key: str, default: float, path: Path) -> float:
    value = default if fields.get(key) is None else fields[key]
    if type(value) not in (int, float):
        raise InputError(f"{path}: {key}={json.dumps(value)} must be a number")
    return float(value)


def _hint(allowed: Any) -> str:
    if allowed is None:
        return "it must be absent"
    values = allowed if type(allowed) is tuple else [allowed]
    return f"it must be {' or '.join(map(json.dumps, values))}"
