"""What cutting one sublayer's synchronisation costs, and the best factors for bytes or for a time.

    python -m caat_jax.sensitivity --workdir=runs/full
    python -m caat_jax.sensitivity --workdir=runs/full --cut_to=0.5,0.25,0 --budget=0.5
    python -m caat_jax.sensitivity --workdir=runs/full --workload=decode --chip=v5p --speedup=1.5

Of a run's newest checkpoint, measures by how much the validation loss rises when one sublayer alone
has a smaller factor: every attention and every MLP, every factor of --cut_to below its own.  Prints
a table and writes WORKDIR/sensitivity.csv and .png; with --budget also WORKDIR/budget_0.5.py, a
config file with the factors that synchronise that fraction of the channels, on average over
sublayers, at the least rise.  With --workload (of --batch, --length and --devices), the best
factors for any predicted time on a chip of the table, or on one of your own (--flops,
--memory_rate, --link_bandwidth, --link_latency), in WORKDIR/frontier.csv and .png; with --speedup
also those that reach it, in WORKDIR/speedup_1.5.py.
docs/sensitivity.md explains all.
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
from caat_jax.config.sections import Config
from caat_jax.data import token_cache
from caat_jax.devices import chips, processes
from caat_jax.errors import InputError
from caat_jax.figures import COLOURS
from caat_jax.sensitivity import cuts as sublayer_cuts
from caat_jax.sensitivity import frontier, plan_config, plans, report
from caat_jax.sensitivity.cuts import Sensitivity, Validation
from caat_jax.sensitivity.link_times import WORKLOADS, LinkTimes
from caat_jax.sensitivity.plans import Limit, Plan
from caat_jax.step_time import own_chip

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
_SPEEDUP = flags.DEFINE_float(
    "speedup", None, "Over p = 1, predicted: writes a config; needs --workload."
)
_SWAPS = flags.DEFINE_integer(
    "swaps", 4, "How many plans like the best one to measure, to take the best of all.", 0
)
_WORKLOAD = flags.DEFINE_enum("workload", None, list(WORKLOADS), "What the time is predicted of.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences of the workload, over all devices.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of each, or slots of the cache; default: data.sequence_length."
)
_DEVICES = flags.DEFINE_integer("devices", None, "How many chips; default: one for each shard.")
_CHIP = flags.DEFINE_string("chip", None, "A chip of the table, whose links it is to be.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, token_cache.CACHE_DIR_HELP)
own_chip.define_flags()
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
    times = _link_times(config)
    limits = _limits(config, sync_factors, times)
    command_line.simulate_devices(config.mesh)
    sequences = config.train.eval_sequences if _SEQUENCES.value is None else _SEQUENCES.value
    validation = Validation(workdir, step, config, sequences, _CACHE_DIR.value)
    sensitivity = sublayer_cuts.measure(validation, cuts)
    found = [plans.find(sensitivity, limit, validation.loss, _SWAPS.value) for limit in limits]
    points = frontier.frontier(sensitivity, times, validation.loss) if times else []
    if processes.is_first():
        _report(sensitivity, found, points, times, workdir)


def _link_times(config: Config) -> LinkTimes | None:
    """Where a workload's time is asked for."""
    devices = config.model.tp_shards if _DEVICES.value is None else _DEVICES.value
    chip = own_chip.from_flags(devices)
    if _CHIP.value is not None:
        if chip is not None:
            raise InputError(f"--chip={_CHIP.value} has figures of its own; leave out --flops")
        chip = chips.by_name(_CHIP.value)
    if _WORKLOAD.value is None:
        for flag, name in ((_SPEEDUP.value, "speedup"), (chip, "chip")):
            if flag is not None:
                raise InputError(f"--{name} needs a --workload: {', '.join(WORKLOADS)}")
        return None
    if chip is None:
        raise InputError(
            f"--workload={_WORKLOAD.value} needs a --chip, or all of {own_chip.flag_names()}"
        )
    length = config.data.sequence_length if _LENGTH.value is None else _LENGTH.value
    return LinkTimes(config, _WORKLOAD.value, _BATCH.value, length, devices, chip)


def _limits(config: Config, sync_factors: list[float], times: LinkTimes | None) -> list[Limit]:
    """Those of --budget and --speedup."""
    limits = []
    if _BUDGET.value is not None:
        limits.append(plans.budget_limit(_BUDGET.value, config.model, sync_factors))
    if _SPEEDUP.value is not None:
        limits.append(times.limit(_SPEEDUP.value, sync_factors))
    return limits


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


def _report(
    sensitivity: Sensitivity,
    found: list[Plan],
    points: list[frontier.Point],
    times: LinkTimes | None,
    workdir: Path,
) -> None:
    contents = {
        "sensitivity.csv": report.to_csv(sensitivity).encode(),
        "sensitivity.png": report.to_png(sensitivity),
    }
    print(report.table(sensitivity))
    if points:
        of_time = next((plan for plan in found if plan.limit.cost == times.cost), None)
        contents["frontier.csv"] = frontier.to_csv(points).encode()
        contents["frontier.png"] = frontier.to_png(points, times, of_time)
        print(f"\n{frontier.table(points, times)}")
    for plan in found:
        contents[plan_config.file_name(plan)] = plan_config.source(
            plan, sensitivity, workdir
        ).encode()
        print(f"\n{_plan_text(plan, sensitivity, times)}")
    for name, content in contents.items():
        files.write(workdir / name, content)
    print(f"\nIn {workdir}:\n{textwrap.fill(', '.join(contents), report.WIDTH)}")


def _plan_text(plan: Plan, sensitivity: Sensitivity, times: LinkTimes | None) -> str:
    name, _, value = plan.limit.flag.partition("=")
    uniform = None if name != "budget" else plans.uniform_rise(sensitivity, float(value))
    model = sensitivity.config.with_sync_factors(plan.sync_factors).model
    beside = "" if uniform is None else f", against {uniform:+.4f} with {value} in every sublayer"
    speed = f"; {times.speed_up(plan.sync_factors):.3f} times as fast as p = 1" if times else ""
    text = (
        f"{name} {value}: predicted rise {plan.rise:+.4f} nats per token{beside}, measured"
        f" {plan.measured_rise:+.4f}; {plans.synchronised(model):.4f} of the channels"
        f" synchronised{speed}; p (attention, MLP) = {model.describe_sync_factors()}"
    )
    return textwrap.fill(text, report.WIDTH)


if __name__ == "__main__":
    command_line.run(main)
