"""Llamas in Hugging Face's format, made and read without torch, and what is done with them."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import flagsaver

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.sections import MeshConfig
from caat_jax.errors import InputError
from caat_jax.huggingface import __main__ as command
from tests import models, reference

TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=64,
)
ROWS = np.random.default_rng(5).integers(0, 64, (2, 12), dtype=np.int32)


def main(*arguments):
    flags.FLAGS.mark_as_parsed()  # there is no command line here
    command.main([str(argument) for argument in arguments])


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()  # what others wrote before
    given = [str(argument) for argument in arguments]
    values = dict(flag[2:].split("=", 1) for flag in given if flag.startswith("--"))
    code = 0
    with flagsaver.as_parsed(**values):
        try:
            main(*(argument for argument in given if not argument.startswith("--")))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
    return code, *capsys.readouterr()


def do(capsys, *arguments):
    code, stdout, stderr = run(capsys, *arguments)
    assert (code, stderr) == (0, ""), stderr
    return stdout


def restored(workdir, M=1):
    """The programs and parameters of the newest checkpoint on a mesh with `model` of M."""
    step, config = checkpoint.newest_config(workdir)
    programs = models.programs(dataclasses.replace(config, mesh=MeshConfig(1, 1, M, 0)))
    with Checkpoints(workdir) as checkpoints:
        return programs, checkpoints.restore_parameters(step, programs.state_shapes.parameters)


def with_targets(rows):
    """A target is the next token; the last has none."""
    return np.concatenate([rows, np.full_like(rows[:, :1], -1)], axis=1)


def our_logits(workdir, M=1, rows=ROWS):
    """float32 [B, T, V] of the newest checkpoint on a mesh with `model` of M, and the mean loss."""
    loss, logits = models.loss_and_logits(*restored(workdir, M), with_targets(rows))
    return logits, loss


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.1  # else the tolerance means nothing
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# ---- Folders by hand --------------------------------------------------------------------------


def write_file(path, tensors):
    """A safetensors file of NumPy arrays, after the format's description."""
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}
    header, data = {}, b""
    for name, array in tensors.items():
        content = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(content)]
        kind = names[str(array.dtype)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += content
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def read_file(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            content[8 + length :][slice(*entry["data_offsets"])],
        )
        for name, entry in header.items()
    }


def llama_by_hand(folder, *, dtype="float32", tied=False, config=None, tensors=None):
    """Writes a Llama; returns the parameters as `reference.py` takes them."""
    sizes = dict(layers=2, embed_dim=32, heads=8, kv_heads=4, head_dim=6, mlp_dim=48)
    parameters = reference.random_parameters(3, **sizes, vocab_size=64, tied_head=tied)
    parameters = jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), parameters)
    found = {
        "model.embed_tokens.weight": parameters["embedding"],
        "model.norm.weight": parameters["final_norm"],
    }
    if not tied:
        found["lm_head.weight"] = parameters["head"].T
    for n in range(2):
        layer = f"model.layers.{n}."
        attention, mlp = parameters["layers"]["attention"], parameters["layers"]["mlp"]
        for name, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            matrix = np.concatenate(list(attention[ours][n].swapaxes(0, 1)), axis=1)
            found[f"{layer}self_attn.{name}_proj.weight"] = matrix.T
        output = np.concatenate(list(attention["output"][n]), axis=0)
        found[f"{layer}self_attn.o_proj.weight"] = output.T
        found[f"{layer}input_layernorm.weight"] = attention["norm"][n]
        found[f"{layer}post_attention_layernorm.weight"] = mlp["norm"][n]
        for name in ("gate", "up", "down"):
            found[f"{layer}mlp.{name}_proj.weight"] = mlp[name][n].T
    found.update(tensors or {})
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", {k: v for k, v in found.items() if v is not None})
    fields = {"model_type": "llama", **SIZES, "num_key_value_heads": 4, "head_dim": 6}
    fields |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "rope_theta": 100}
    fields |= {"bos_token_id": 7, "eos_token_id": [8, 9], "torch_dtype": dtype} | (config or {})
    fields = {key: value for key, value in fields.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(fields))
    return jax.tree.map(lambda a: a.astype(np.float64), parameters)


def assert_refused(result, *said):
    code, stdout, stderr = result
    assert (code, stdout) == (2, ""), stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert [part for part in said if part not in stderr] == [], stderr
