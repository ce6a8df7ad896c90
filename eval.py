"""Evaluates a run's newest checkpoint: prints a table and writes WORKDIR/evaluation.json.

python eval.py --workdir=runs/tiny                          # loss on the whole validation split
python eval.py --workdir=runs/tiny --tasks=hellaswag,piqa   # lm-evaluation-harness instead
python eval.py --workdir=runs/tiny --config.data.files=book.txt --config.data.holdout_every=1
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import types
from typing import Any

from absl import flags

from caat_jax import command_line
from caat_jax.checkpoints import checkpoints
from caat_jax.config import user_paths
from caat_jax.config.resolve import with_data
from caat_jax.data import token_cache
from caat_jax.devices import processes
from caat_jax.errors import InputError
from caat_jax.evaluation import report as evaluation
from caat_jax.storage import mirrors

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)
_TASKS = flags.DEFINE_list(
    "tasks", None, "Tasks of the lm-evaluation-harness, such as hellaswag,piqa."
)
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A folder of more task YAML files.")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before each question; default: as the task has it.", 0
)
_LIMIT = flags.DEFINE_integer("limit", None, "Only so many examples of each task.", 1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Sequences at a time; default: as in training.", 1
)
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, token_cache.CACHE_DIR_HELP)
_OVERRIDES = command_line.overrides_flag()
processes.define_flags()


def main(data: dict[str, Any]) -> None:
    harness = _harness(data)
    workdir = mirrors.folder("--workdir", _WORKDIR.value)
    processes.start()
    step, config = checkpoints.newest_config(workdir)
    config = with_data(config, data)
    report = evaluation.Report(workdir, step, config)
    command_line.simulate_devices(config.mesh)
    if harness:
        tasks, table = harness.evaluate_tasks(workdir, step, config, _task_options(harness))
        if processes.is_first():
            report.add_tasks(tasks)
    else:
        cache_dir = data.pop("cache_dir", _CACHE_DIR.value)
        validation = evaluation.evaluate_checkpoint(workdir, step, config, cache_dir)
        table = validation.table()
        if processes.is_first():
            report.add_validation(validation, " ".join(f"{k}={v}" for k, v in sorted(data.items())))
    model = config.model
    with processes.silent_unless_first():
        print(f"step {step}, S={model.tp_shards}, p={model.describe_sync_factors()}\n{table}")


def _harness(data: dict[str, Any]) -> types.ModuleType | None:
    """`caat_jax.evaluation.harness` where --tasks is given; tasks bring their own text."""
    if _TASKS.value is None:
        for flag in (_INCLUDE_PATH, _NUM_FEWSHOT, _LIMIT, _BATCH_SIZE):
            if flag.value is not None:
                raise InputError(f"--{flag.name} is about tasks; give --tasks too")
        return None
    for name in data.keys() - {"sequence_length", "tokenizer"}:
        raise InputError(f"--config.data.{name} is about the validation loss, not about tasks")
    if not _TASKS.value or not all(_TASKS.value):
        raise InputError("--tasks lacks a name; give some, such as --tasks=hellaswag,piqa")
    try:
        from caat_jax.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "lm_eval":
            raise
        raise InputError(
            "--tasks needs lm_eval, which is not installed: pip install -r requirements-eval.txt"
        ) from None
    return harness


def _task_options(harness: types.ModuleType) -> object:
    return harness.TaskOptions(
        names=tuple(dict.fromkeys(_TASKS.value)),
        include_path=_INCLUDE_PATH.value
        and user_paths.expanded("--include_path", _INCLUDE_PATH.value),
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
        batch_size=_BATCH_SIZE.value,
    )


if __name__ == "__main__":
    command_line.run(main, _OVERRIDES, command_line.data_overrides)
