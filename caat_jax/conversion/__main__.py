"""Makes a CAAT-Net of a dense model without training.

    python -m caat_jax.conversion --workdir=runs/full --output=runs/half --sync_factor=0.5
    python -m caat_jax.conversion --workdir=runs/imported --output=runs/half --sync_factor=0.5 \\
        --files="~/books/**/*.txt" --calibration_tokens=100000

Takes a run's newest checkpoint, at p = 1, turns its residual stream so that the directions that
cost most when private are shared, and fits the weights sublayer by sublayer on calibration text, so
that every shard's stream stays near the dense model's.  Prints how near, and the loss on held-out
text; writes the workdir OUTPUT, with conversion.csv and conversion.json in it.  The same command
again resumes an interrupted conversion.  docs/conversion.md explains the method.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import ast
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from absl import flags

from caat_jax import command_line, files
from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.checkpoints.trained import restore_model, tokenizer_of
from caat_jax.config import user_paths
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.config.stored import base_fields
from caat_jax.conversion import converting, report
from caat_jax.conversion.converting import Converted
from caat_jax.conversion.progress import Progress
from caat_jax.conversion.texts import Texts, open_texts
from caat_jax.data import carried_tokenizer, token_cache
from caat_jax.data.loader import NOTHING_READ
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.huggingface import config_file, folders
from caat_jax.training.step import Programs
from configs import base

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a dense model, p = 1.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A folder that is new or empty.", required=True)
_SYNC_FACTOR = flags.DEFINE_float("sync_factor", None, "p of every sublayer.")
_PER_LAYER = flags.DEFINE_string(
    "sync_factor_per_layer", None, "Instead: as model.sync_factor_per_layer in configs/base.py."
)
_TP_SHARDS = flags.DEFINE_integer("tp_shards", None, "S; default: the workdir's.")
_FILES = flags.DEFINE_string("files", None, "Text, as data.files; default: the workdir's own.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, token_cache.CACHE_DIR_HELP)
_CALIBRATION_TOKENS = flags.DEFINE_integer("calibration_tokens", 100_000, "To fit on.", 1)
_HELD_OUT_TOKENS = flags.DEFINE_integer("held_out_tokens", 20_000, "To measure the loss on.", 1)
_BASIS = flags.DEFINE_enum(
    "basis",
    converting.ROTATION,
    converting.BASES,
    "Turn the stream, which unties a tied head, or only permute its channels.",
)
# Tokens at a time: few enough for any device, enough for its matrix products.
_BATCH_TOKENS = 4096


def main() -> None:
    workdir = user_paths.expanded("--workdir", _WORKDIR.value)
    output = user_paths.expanded("--output", _OUTPUT.value)
    folders.check_new(output)
    step, stored = checkpoints.newest_config(workdir)
    if not stored.model.is_dense:
        raise InputError(
            f"--workdir={workdir} has p={stored.model.describe_sync_factors()}; only a dense model,"
            " p = 1, can be converted"
        )
    dense, target = _configurations(stored)
    command_line.simulate_devices(target.mesh)
    mesh = resolve_mesh(target, len(jax.devices()))
    dense, target = (dataclasses.replace(config, mesh=mesh) for config in (dense, target))
    texts = _texts(target, workdir)
    model = restore_model(workdir, step, dense)
    print(report.memory(target.model, texts, mesh.model, model.parameters), flush=True)
    progress = Progress(output, _settings(workdir, step, target))
    parameters = jax.tree.map(np.array, model.parameters)  # copies: these are changed
    converted = converting.convert(
        parameters, dense, target, model.mesh, texts, progress, new_basis=_BASIS.value
    )
    _write(output, workdir, dataclasses.replace(target, compute=stored.compute), converted, texts)
    progress.remove()
    print(report.table(converted))
    print(
        f"\n{output} holds the CAAT-Net, S={target.model.tp_shards},"
        f" p={target.model.describe_sync_factors()}: python eval.py --workdir={output};"
        f" to train on, python train.py --config={output / config_file.NAME} --workdir={output}"
        f" --config.train.teacher={workdir}, with a learning rate and steps"
    )


def _configurations(stored: Config) -> tuple[Config, Config]:
    """The dense model's, and that of what it becomes; both with the S of the latter.

    Raises:
      InputError: a flag does not fit the model.
    """
    fields = base.get_config()
    fields.update(base_fields(stored))
    fields.model.tp_shards = (
        stored.model.tp_shards if _TP_SHARDS.value is None else _TP_SHARDS.value
    )
    fields.mesh.update(dict(data=-1, fsdp=1, model=-1))
    fields.train.sync_schedule = ()
    # Sums over all tokens, and small differences: no shorter type.
    fields.compute.update(
        dict(
            dtype="float32",
            forward_wire_dtype="float32",
            backward_wire_dtype="float32",
            emulate_wires=False,
            attention="auto",
        )
    )
    dense = resolve(fields)
    if (_SYNC_FACTOR.value is None) == (_PER_LAYER.value is None):
        raise InputError("give one of --sync_factor, such as 0.5, and --sync_factor_per_layer")
    if _PER_LAYER.value is None:
        fields.model.update(dict(sync_factor=_SYNC_FACTOR.value, sync_factor_per_layer=()))
    else:
        fields.model.sync_factor_per_layer = _literal(_PER_LAYER.value)
    target = resolve(fields)
    if _BASIS.value == converting.ROTATION and not target.model.is_dense:
        untied = dataclasses.replace(target.model, tied_head=False)
        target = dataclasses.replace(target, model=untied)
    return dense, target


def _literal(text: str) -> tuple:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, (tuple, list)) or not value:
        raise InputError(
            f'--sync_factor_per_layer={text} is not a tuple, such as "(1, 0.5, (0.5, 0), 0.5)"'
        )
    return tuple(value)


def _texts(target: Config, workdir: Path) -> Texts:
    data, prepare = token_cache.stored_data(target.data, _CACHE_DIR.value)
    if _FILES.value is not None:
        data = dataclasses.replace(data, files=_FILES.value, tfds_name="")
    return open_texts(
        data,
        tokenizer_of(target, workdir),
        calibration_tokens=_CALIBRATION_TOKENS.value,
        held_out_tokens=_HELD_OUT_TOKENS.value,
        batch_tokens=_BATCH_TOKENS,
        parts=target.mesh.data,
        prepare=prepare,
    )


def _settings(workdir: Path, step: int, target: Config) -> dict[str, object]:
    """All that decides the result."""
    return {
        "workdir": str(workdir.absolute()),
        "step": step,
        "basis": _BASIS.value,
        "files": _FILES.value,
        "calibration_tokens": _CALIBRATION_TOKENS.value,
        "model": dataclasses.asdict(target.model),
    }


def _write(output: Path, workdir: Path, target: Config, converted: Converted, texts: Texts) -> None:
    programs = Programs(target, sharding.create_mesh(target.mesh))
    shardings = sharding.named_shardings(programs.mesh, programs.blueprint.specs)
    state = programs.fresh_state(jax.device_put(converted.parameters, shardings))
    with folders.complete_folder(output) as folder:
        for carried in (carried_tokenizer.FOLDER, carried_tokenizer.IMPORTED_FOLDER):
            if (workdir / carried).is_dir():
                shutil.copytree(workdir / carried, folder / carried)
        with Checkpoints(folder) as saved:
            saved.save(state, 0, target, NOTHING_READ)
        files.write(folder / config_file.NAME, config_file.source_code(target, folder))
        files.write(folder / "conversion.csv", report.to_csv(converted))
        figures = report.to_json(converted, texts, target.model)
        files.write(folder / "conversion.json", json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(main)
