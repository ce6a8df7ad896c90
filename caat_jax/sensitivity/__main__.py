"""What cutting one sublayer's synchronisation costs, and the best factors for a budget.

    python -m caat_jax.sensitivity --workdir=runs/full
    python -m caat_jax.sensitivity --workdir=runs/full --cut_to=0.5,0.25,0 --budget=0.5

Of a run's newest checkpoint, measures by how much the validation loss rises when one sublayer alone
has a smaller factor: every attention and every MLP, every factor of --cut_to below its own.  Prints
a table and writes WORKDIR/sensitivity.csv and .png; with --budget also WORKDIR/budget_0.5.py, a
config file with the factors that synchronise that fraction of the channels, on average over
sublayers, at the least predicted rise.  docs/sensitivity.md explains both.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import textwrap
from pathlib import Path

from absl import flags

from caat_jax import command_line, files
from caat_jax.checkpoints import checkpoints
from caat_jax.config import user_paths
from caat_jax.data import token_cache
from caat_jax.devices import processes
from caat_jax.errors import InputError
from caat_jax.figures import COLOURS
from caat_jax.sensitivity import budget_config, report
from caat_jax.sensitivity import cuts as sublayer_cuts
from caat_jax.sensitivity.budget_config import Plan
from caat_jax.sensitivity.cuts import Sensitivity

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)
_CUT_TO = flags.DEFINE_list("cut_to", "0.75,0.5,0.25,0.0", "Factors to cut a sublayer to.")
_SEQUENCES = flags.DEFINE_integer(
    "sequences",
    None,
    "The first so many validation sequences; -1: all; default: train.eval_sequences.",
)
_BUDGET = flags.DEFINE_float(
    "budget", None, "The mean fraction of channels that may be synchronised: writes a config."
)
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, token_cache.CACHE_DIR_HELP)
processes.define_flags()


def main() -> None:
    sync_factors = _sync_factors()
    if _SEQUENCES.value is not None and _SEQUENCES.value != -1 and _SEQUENCES.value < 1:
        raise InputError(f"--sequences={_SEQUENCES.value} must be at least 1, or -1 for all")
    workdir = user_paths.expanded("--workdir", _WORKDIR.value)
    processes.start()
    step, config = checkpoints.newest_config(workdir)
    cuts = sublayer_cuts.cuts_below(config.model, sync_factors)
    if not cuts:
        largest = max(p for pair in config.model.sync_factors for p in pair)
        raise InputError(
            f"--cut_to={','.join(_CUT_TO.value)} has no factor below the checkpoint's own, of"
            f" which the largest is {largest}"
        )
    if _BUDGET.value is not None:
        budget_config.check_budget(_BUDGET.value, config.model, sync_factors)
    command_line.simulate_devices(config.mesh)
    sequences = config.train.eval_sequences if _SEQUENCES.value is None else _SEQUENCES.value
    sensitivity = sublayer_cuts.measure(workdir, step, config, cuts, sequences, _CACHE_DIR.value)
    plan = None if _BUDGET.value is None else budget_config.plan(sensitivity, _BUDGET.value)
    if processes.is_first():
        _report(sensitivity, plan, workdir)


def _sync_factors() -> list[float]:
    """Those of --cut_to, each once, the largest first."""
    factors = set()
    for text in _CUT_TO.value:
        try:
            factor = float(text)
        except ValueError:
            raise InputError(
                f"--cut_to: {text!r} is no number; give some, such as --cut_to=0.5,0"
            ) from None
        if not 0 <= factor <= 1:
            raise InputError(f"--cut_to={text} is outside [0, 1]")
        factors.add(factor)
    if not 0 < len(factors) <= len(COLOURS):
        raise InputError(
            f"--cut_to={','.join(_CUT_TO.value)} has {len(factors)} factors; give 1 to"
            f" {len(COLOURS)}, more cannot be told apart in the picture"
        )
    return sorted(factors, reverse=True)


def _report(sensitivity: Sensitivity, plan: Plan | None, workdir: Path) -> None:
    contents = {
        "sensitivity.csv": report.to_csv(sensitivity).encode(),
        "sensitivity.png": report.to_png(sensitivity),
    }
    print(report.table(sensitivity))
    if plan:
        name = budget_config.file_name(plan.budget)
        contents[name] = budget_config.source(plan, sensitivity, workdir).encode()
        print(f"\n{_plan_text(plan)}")
    for name, content in contents.items():
        files.write(workdir / name, content)
    print(f"\nIn {workdir}: {', '.join(contents)}")


def _plan_text(plan: Plan) -> str:
    uniform = ""
    if plan.uniform_rise is not None:
        uniform = f", against {plan.uniform_rise:+.4f} with {plan.budget} in every sublayer"
    text = (
        f"budget {plan.budget}: predicted rise {plan.rise:+.4f} nats per token{uniform};"
        f" {plan.synchronised:.4f} of the channels synchronised, p (attention, MLP) ="
        f" {plan.config.model.describe_sync_factors()}"
    )
    return textwrap.fill(text, report.WIDTH)


if __name__ == "__main__":
    command_line.run(main)
