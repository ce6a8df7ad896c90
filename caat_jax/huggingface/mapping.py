"""Which parameter is which tensor of a Llama in Hugging Face's format: one table, both ways.

A linear layer of that format is a matrix [out, in]; here inputs come first, heads and their width
are two axes, and the layers are stacked.  Nothing else differs: the rotary embedding has the same
half-split layout.

Axis letters: N layers, D residual width, H heads, K key/value heads, h width of a head, F MLP
width, V vocabulary.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from caat_jax.config.architecture import Architecture
from caat_jax.errors import InputError
from caat_jax.huggingface.safetensors_files import StoredTensor


class Row(NamedTuple):
    """One parameter, or one a layer where `tensor` has {layer} in it.

    `inputs` is how many leading axes (after the layers') are inputs of a linear layer, whose tensor
    is [out, in]; 0 where the tensor is the parameter as it is.
    """

    parameter: tuple[str, ...]
    tensor: str
    inputs: int

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.tensor


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = ("layers", "attention"), ("layers", "mlp")

TABLE = (
    Row(("embedding",), "model.embed_tokens.weight", 0),  # [V, D]
    Row((*_ATTENTION, "norm"), _LAYER + "input_layernorm.weight", 0),  # N x [D]
    Row((*_ATTENTION, "query"), _LAYER + "self_attn.q_proj.weight", 1),  # N x [D, H, h]
    Row((*_ATTENTION, "key"), _LAYER + "self_attn.k_proj.weight", 1),  # N x [D, K, h]
    Row((*_ATTENTION, "value"), _LAYER + "self_attn.v_proj.weight", 1),  # N x [D, K, h]
    Row((*_ATTENTION, "output"), _LAYER + "self_attn.o_proj.weight", 2),  # N x [H, h, D]
    Row((*_MLP, "norm"), _LAYER + "post_attention_layernorm.weight", 0),  # N x [D]
    Row((*_MLP, "gate"), _LAYER + "mlp.gate_proj.weight", 1),  # N x [D, F]
    Row((*_MLP, "up"), _LAYER + "mlp.up_proj.weight", 1),  # N x [D, F]
    Row((*_MLP, "down"), _LAYER + "mlp.down_proj.weight", 1),  # N x [F, D]
    Row(("final_norm",), "model.norm.weight", 0),  # [D]
    Row(("head",), "lm_head.weight", 1),  # [D, V]; absent where it is tied
)

# Tensors that some folders hold although a Llama computes them.
_COMPUTED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_EMBEDDING, _HEAD = TABLE[0].tensor, TABLE[-1].tensor


def at(tree: Any, row: Row) -> Any:
    """The row's leaf of a nested dictionary of parameters."""
    for name in row.parameter:
        tree = tree[name]
    return tree


def nested(row: Row, leaf: Any) -> Any:
    """A nested dictionary with that leaf alone."""
    for name in reversed(row.parameter):
        leaf = {name: leaf}
    return leaf


def rows(arch: Architecture) -> list[Row]:
    """The rows of the parameters that this architecture has."""
    return [row for row in TABLE if not (arch.tied_head and row.tensor == _HEAD)]


def tensors(
    row: Row, parameter_shape: tuple[int, ...]
) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """(name, layer, shape) of the row's tensors; the layer is None where there are no layers."""
    if not row.per_layer:
        yield row.tensor, None, _tensor_shape(row, parameter_shape)
        return
    for layer in range(parameter_shape[0]):
        name = row.tensor.format(layer=layer)
        yield name, layer, _tensor_shape(row, parameter_shape[1:])


def as_parameter(row: Row, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A view of a tensor as the parameter, or as one layer of it, of that shape."""
    if not row.inputs:
        return tensor
    # Splits the tensor's two axes first, so that nothing is copied.
    outputs_first = tensor.reshape(*shape[row.inputs :], *shape[: row.inputs])
    outputs = len(shape) - row.inputs
    return outputs_first.transpose(*range(outputs, len(shape)), *range(outputs))


def as_tensor(row: Row, parameter: np.ndarray) -> np.ndarray:
    """The tensor of a parameter, or of one layer of it."""
    if not row.inputs:
        return parameter
    inputs = int(np.prod(parameter.shape[: row.inputs]))
    return parameter.reshape(inputs, -1).T


def check(found: Mapping[str, tuple[int, ...]], arch: Architecture, shapes: Any) -> None:
    """Refuses tensors that are not those of a Llama of this architecture.

    Args:
      found: the shape of each tensor that is there.
      arch: the architecture.
      shapes: the parameters' shapes, a nested dictionary of `jax.ShapeDtypeStruct`.

    Raises:
      InputError: naming a tensor that is missing, unexpected or of another shape.
    """
    expected = {
        name: shape for row in rows(arch) for name, _, shape in tensors(row, at(shapes, row).shape)
    }
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{_some(missing)} missing from the safetensors files")
    extra = [name for name in found if name not in expected and not _computed(name, arch)]
    if extra:
        raise InputError(f"{_some(extra)} in the safetensors files, but not part of a Llama")
    for name, shape in expected.items():
        if found[name] != shape:
            raise InputError(
                f"{name} has shape {list(found[name])}; by config.json it must be {list(shape)}"
            )


def has_other_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether there is a head that differs from the embedding."""
    if _HEAD not in tensors or _EMBEDDING not in tensors:
        return False
    return not np.array_equal(tensors[_HEAD].array(), tensors[_EMBEDDING].array())


def _computed(name: str, arch: Architecture) -> bool:
    return bool(_COMPUTED.fullmatch(name)) or (arch.tied_head and name == _HEAD)


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {len(names) - 1} more are"


def _tensor_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not row.inputs:
        return shape
    inputs = int(np.prod(shape[: row.inputs]))
    return int(np.prod(shape)) // inputs, inputs
