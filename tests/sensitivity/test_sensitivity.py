"""What single cuts cost, the factors for a budget, and the files of both."""

import ast
import csv
import dataclasses
import importlib.util
import io
import math
import re

import jax
import matplotlib.image
import numpy as np
import pytest

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.architecture import Stage
from caat_jax.config.resolve import resolve
from caat_jax.config.stored import base_fields
from caat_jax.data import token_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.sensitivity import cuts as sublayer_cuts
from caat_jax.sensitivity import plan_config, plans, report
from caat_jax.sensitivity.cuts import Cut, Sensitivity
from configs import base
from tests import models, reference, runs
from tests.command_line import assert_refused, run_forked, run_here

COMMAND = "caat_jax/sensitivity/__main__.py"
TEXTS = [f"text number {n} of those that {'a shard ' * (n % 5)} reads" for n in range(24)]
OWN = ((1.0, 0.5), (0.5, 0.25))
FACTORS = [0.75, 0.0]
# With D = 32: the cut, and D_s of every sublayer then.
CUT_WIDTHS = {
    Cut(0, "attention", 0.75): ((24, 16), (16, 8)),
    Cut(0, "attention", 0.0): ((0, 16), (16, 8)),
    Cut(0, "mlp", 0.0): ((32, 0), (16, 8)),
    Cut(1, "attention", 0.0): ((32, 16), (0, 8)),
    Cut(1, "mlp", 0.0): ((32, 16), (16, 0)),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a short run of 2 layers whose own validation read two sequences only."""
    fields = {
        "model.sync_factor_per_layer": OWN,
        "train.eval_sequences": 2,
        "train.steps": 12,
    }
    return models.small_run(tmp_path_factory.mktemp("run"), TEXTS, fields)


@pytest.fixture(scope="module")
def measured(workdir):
    """On all 8 devices."""
    step, config = checkpoint.newest_config(workdir)
    cuts = sublayer_cuts.cuts_below(config.model, FACTORS)
    validation = sublayer_cuts.Validation(workdir, step, config, sequences=5)
    return sublayer_cuts.measure(validation, cuts)


def plan_of(sensitivity: Sensitivity, budget: float, loss=lambda _: 2.5) -> plans.Plan:
    """By prediction alone; measured, every plan has this loss."""
    limit = plans.budget_limit(budget, sensitivity.config.model, sensitivity.sync_factors())
    return plans.find(sensitivity, limit, loss, swaps=0)


def shared_by(plan: plans.Plan, sensitivity: Sensitivity) -> float:
    return plans.synchronised(plan_config.with_plan(sensitivity.config, plan).model)


def made_up(rises: dict[Cut, float], **model) -> Sensitivity:
    """Of a model of 2 layers and these fields, with an uncut loss of 2."""
    config = models.small_config(model=model)
    return Sensitivity(30, config, 2.0, {cut: 2.0 + rise for cut, rise in rises.items()})


def in_all_sublayers(rises: dict[float, float], layers=2) -> dict[Cut, float]:
    return {
        Cut(layer, sublayer, factor): rise
        for layer in range(layers)
        for sublayer in ("attention", "mlp")
        for factor, rise in rises.items()
    }


# ---- Measured ---------------------------------------------------------------------------------


def emulated_loss(workdir, sync_widths):
    """Of the checkpoint with these widths, over 5 sequences, in float64."""
    step, config = checkpoint.newest_config(workdir)
    rows = token_cache.open_cache(config.data, load_tokenizer("bytes")).validation
    rows = np.stack([rows[n] for n in range(5)])
    one_device = dataclasses.replace(config.mesh, data=1, fsdp=1, model=1)
    programs = models.programs(dataclasses.replace(config, mesh=one_device))
    with Checkpoints(workdir) as checkpoints:
        parameters = jax.device_get(
            checkpoints.restore_parameters(step, programs.state_shapes.parameters)
        )
    method = models.method(config) | dict(sync_widths=sync_widths)
    inputs, targets = np.maximum(rows[:, :-1], 0), rows[:, 1:]
    return reference.loss(parameters, inputs, targets, **method)


def test_losses_are_those_of_the_emulation(workdir, measured):
    _, config = checkpoint.newest_config(workdir)

    def expected(sync_widths):
        return emulated_loss(workdir, sync_widths)

    assert measured.config == config
    assert measured.uncut_loss == pytest.approx(expected(((32, 16), (16, 8))), abs=2e-6)
    assert list(measured.cut_losses) == list(CUT_WIDTHS)
    for cut, loss in measured.cut_losses.items():
        assert loss == pytest.approx(expected(CUT_WIDTHS[cut]), abs=2e-6)
    losses = sorted(measured.cut_losses.values())
    assert np.diff(losses).min() > 1e-5  # so that none was taken for another


def test_command_writes_what_it_prints(workdir, measured, tmp_path):
    arguments = ["--cut_to=0,0.75,0", "--sequences=5", "--budget=0.25", "--swaps=0"]
    arguments += ["--workload=decode", "--speedup=1.5", "--flops=1e15", "--memory_rate=1e15"]
    arguments += ["--link_bandwidth=1e9", "--link_latency=1e-3"]
    code, stdout, stderr = run_forked([COMMAND, f"--workdir={workdir}", *arguments], tmp_path)
    assert code == 0, stderr
    said = " ".join(stdout.split())
    assert max(map(len, stdout.replace(str(workdir), "WORKDIR").splitlines())) <= 80

    uncut, *rows = csv.DictReader(io.StringIO((workdir / "sensitivity.csv").read_text()))
    assert (uncut["layer"], uncut["sublayer"], uncut["sync_factor"]) == ("", "", "")
    # On one device, not on eight.
    assert float(uncut["loss"]) == pytest.approx(measured.uncut_loss, abs=2e-6)
    assert f"validation loss {float(uncut['loss']):.6f}" in said
    cuts = [Cut(int(r["layer"]), r["sublayer"], float(r["sync_factor"])) for r in rows]
    assert cuts == list(CUT_WIDTHS)
    for row, loss in zip(rows, measured.cut_losses.values(), strict=True):
        assert float(row["loss"]) == pytest.approx(loss, abs=2e-6)
        rise = float(row["loss"]) - float(uncut["loss"])
        assert float(row["rise"]) == pytest.approx(rise, abs=1e-12)
    printed = [float(number) for number in re.findall(r" ([+-]\d+\.\d{4})(?=\s)", stdout)]
    assert printed[: len(rows)] == pytest.approx([float(r["rise"]) for r in rows], abs=6e-5)

    assert matplotlib.image.imread(workdir / "sensitivity.png").shape[0] > 400
    resolved = resolve(imported(workdir / "budget_0.25.py").get_config())
    plan = plan_of(measured, 0.25)
    assert resolved == plan_config.with_plan(measured.config, plan)
    assert shared_by(plan, measured) <= 0.25
    assert f"predicted rise {plan.rise:+.4f}" in said
    loss = emulated_loss(workdir, resolved.model.sync_widths)
    assert f"measured {loss - measured.uncut_loss:+.4f}" in said
    assert not list(workdir.glob("*.new"))

    # Latency is all there is: 4 reductions of 14 hops and two gathers of 7 at p = 1.
    points = list(csv.DictReader(io.StringIO((workdir / "frontier.csv").read_text())))
    for point in points:
        hops = 14 * (4 - int(point["skipped"])) + 14
        assert float(point["speed_up"]) == pytest.approx(70 / hops, rel=1e-3)
        assert f"{1000 * float(point['seconds']):.4g}" in said
    assert [int(point["skipped"]) for point in points] == [0, 1, 2, 3, 4]
    factors = ast.literal_eval(points[2]["factors"])
    loss = emulated_loss(workdir, measured.config.with_sync_factors(factors).model.sync_widths)
    assert float(points[2]["measured_rise"]) == pytest.approx(loss - measured.uncut_loss, abs=4e-6)
    assert matplotlib.image.imread(workdir / "frontier.png").shape[0] > 400
    fast = resolve(imported(workdir / "speedup_1.5.py").get_config())
    assert sum(p == 0 for pair in fast.model.sync_factors for p in pair) == 2

    # train.py takes the file: it is the flag after it that is refused.
    command = ["train.py", f"--config={workdir}/budget_0.25.py", f"--workdir={tmp_path}/new"]
    assert_refused(run_forked([*command, "--config.train.steps=0"], tmp_path), "train.steps=0")


def test_by_default_as_many_sequences_as_in_training(workdir, tmp_path):
    arguments = [f"--workdir={workdir}", "--cut_to=0.9"]  # one cut alone
    code, _, stderr = run_forked([COMMAND, *arguments], tmp_path)
    assert code == 0, stderr
    uncut, _ = csv.DictReader(io.StringIO((workdir / "sensitivity.csv").read_text()))
    in_training = runs.series(workdir, "eval/loss")[12]
    assert float(uncut["loss"]) == pytest.approx(in_training, abs=2e-6)


# ---- Reports ----------------------------------------------------------------------------------


def test_table_has_a_dash_where_nothing_is_cut():
    factors = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    rises = in_all_sublayers({0.4: -0.25})
    rises |= {Cut(1, "mlp", factor): factor for factor in factors}
    lines = report.table(made_up(rises, sync_factor_per_layer=(0.5, (0.5, 1.0))))
    assert max(map(len, lines.splitlines())) <= 80
    *_, first, last = (block.splitlines() for block in lines.split("\n\n"))
    # Five factors, then the sixth.
    assert first[0].split() == ["layer", "sublayer", "own", "0.9", "0.8", "0.7", "0.6", "0.5"]
    assert first[1].split() == ["0", "attention", "0.5", *"-----"]
    assert first[4].split()[:5] == ["1", "mlp", "1", "+0.9000", "+0.8000"]
    assert [line.split()[-1] for line in last] == [
        "0.4",
        "-0.2500",
        "-0.2500",
        "-0.2500",
        "+0.4000",
    ]


def test_losses_that_are_no_numbers_are_reported():
    rises = {Cut(0, "attention", 0.5): math.nan, Cut(0, "mlp", 0.5): math.inf}
    measured = made_up(rises | {Cut(1, "mlp", 0.5): 0.25})
    assert re.search(r"attention +1 +\+?nan\n +0 +mlp +1 +\+inf", report.table(measured))
    rows = [line.split(",")[-2:] for line in report.to_csv(measured).splitlines()]
    assert rows == [
        ["loss", "rise"],
        ["2.0", "0.0"],
        ["nan", "nan"],
        ["inf", "inf"],
        ["2.25", "0.25"],
    ]
    assert report.to_png(measured)


# ---- Budgets ----------------------------------------------------------------------------------


def test_plan_takes_the_cuts_that_cost_least():
    """Of 4 sublayers, 2 may be synchronised: the two that it costs most to cut wholly."""
    rises = in_all_sublayers({0.5: 0.25, 0.0: 0.5})
    rises |= {Cut(0, "mlp", 0.0): 0.125, Cut(0, "mlp", 0.5): 0.0625, Cut(1, "attention", 0.0): 0.25}
    measured = made_up(rises)
    plan = plan_of(measured, 0.5)
    assert plan.sync_factors == ((1.0, 0.0), (0.0, 1.0))
    assert plan.rise == 0.375 and shared_by(plan, measured) == 0.5
    assert plan.measured_rise == 0.5
    assert plans.uniform_rise(measured, 0.5) == 0.8125
    assert plans.uniform_rise(measured, 0.6) is None


def test_plan_takes_what_lowers_the_loss():
    plan = plan_of(made_up(in_all_sublayers({0.75: -0.5, 0.0: -0.25})), 1.0)
    assert plan.sync_factors == ((0.75, 0.75),) * 2
    assert plan.rise == -2.0


def test_plan_without_cuts_costs_nothing():
    rises = in_all_sublayers({0.25: 0.5})
    measured = made_up(rises, sync_factor=0.5)
    plan = plan_of(measured, 0.5)
    assert plan_config.with_plan(measured.config, plan) == measured.config and plan.rise == 0.0


def test_plan_never_takes_a_loss_that_is_no_number():
    rises = in_all_sublayers({0.5: math.nan, 0.25: 1.0})
    plan = plan_of(made_up(rises), 0.5)
    assert {p for pair in plan.sync_factors for p in pair} == {0.25, 1.0}
    with pytest.raises(InputError, match=r"--budget=0\.5 cannot be met: .* not finite"):
        plan_of(made_up(in_all_sublayers({0.5: math.nan})), 0.5)


# ---- The config file --------------------------------------------------------------------------


def imported(path):
    spec = importlib.util.spec_from_file_location("budget", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unusual_config(**model):
    """With fields of every section that are not base's."""
    config = base.get_config()
    config.seed = 7
    config.model.update(models.SMALL | dict(rope_base=500_000.0, tied_head=True) | model)
    config.compute.update(dtype="bfloat16", remat=True)
    config.mesh.update(data=1, model=4, simulated_devices=4)
    config.data.update(files="""~/it's "here"/*.txt""", holdout_every=3)
    config.optimizer.update(epsilon=1e-5, gradient_clip_norm=math.inf, decay_steps=70)
    config.train.update(steps=80, eval_sequences=-1, profile_step=3)
    return resolve(config)


@pytest.mark.parametrize(
    ("own", "stated"),
    [
        (dict(), "((30, 1.0),)"),
        (dict(sync_factor_per_layer=(1.0, (1.0, 0.75))), "((30, ((1.0, 1.0), (1.0, 0.75))),)"),
    ],
    ids=["uniform", "per layer"],
)
def test_config_file_is_the_checkpoints_with_other_factors(tmp_path, own, stated):
    config = unusual_config(**own)
    stage = Stage(20, ((0.25, 0.5),) * 2)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, sync_schedule=(stage,))
    )
    for section, fields in base_fields(resolve(base.get_config())).items():
        assert fields != base_fields(config)[section]
    rises = in_all_sublayers({0.5: 0.25, 0.0: 1.0})
    measured = Sensitivity(30, config, 2.0, {cut: 2.0 + rise for cut, rise in rises.items()})
    plan = plan_of(measured, 0.5)
    workdir = tmp_path / 'a """run""" \\new'
    workdir.mkdir()
    path = workdir / plan_config.file_name(plan)
    assert path.name == "budget_0.5.py"
    path.write_text(plan_config.source(plan, measured, workdir))
    module = imported(path)
    resolved = resolve(module.get_config())
    assert resolved == plan_config.with_plan(config, plan)
    # The schedule was the checkpoint's way to its own factors.
    train = dataclasses.replace(config.train, sync_schedule=())
    expected = dataclasses.replace(config, train=train).with_sync_factors(((0.5, 0.5),) * 2)
    assert resolved == expected != config
    assert plan.rise == 1.0

    said = " ".join(module.__doc__.split())
    commands = re.findall(r"python train\.py '--config=(.*?)' --workdir=NEW(.*)", module.__doc__)
    assert commands == [
        (str(path), ""),
        (str(path), f" --config.train.sync_schedule='{stated}' --config.train.steps=MORE"),
    ]
    for part in (
        "checkpoint of step 30",
        "--budget=0.5",
        "+0.500000 measured, +1.000000 predicted",
    ):
        assert part in said


def test_config_file_sets_only_what_differs_from_base(tmp_path):
    config = resolve(base.get_config())
    measured = Sensitivity(30, config, 2.0, {Cut(0, "mlp", 0.5): 2.5})
    text = plan_config.source(plan_of(measured, 1.0), measured, tmp_path)
    assert re.findall(r"^    config\.(\S+) = ", text, re.MULTILINE) == [
        # What resolving works out, and the factors.
        "model.head_dim",
        "compute.forward_wire_dtype",
        "optimizer.warmup_steps",
        "optimizer.cooldown_steps",
        "optimizer.decay_steps",
        "model.sync_factor_per_layer",
    ]


# ---- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cut_to=0.5,1.5"], ["--cut_to=1.5", "[0, 1]"]),
        (["--cut_to=-0.5"], ["--cut_to=-0.5", "[0, 1]"]),
        (["--cut_to=nan"], ["--cut_to=nan", "[0, 1]"]),
        (["--cut_to=0.5,half"], ["--cut_to", "'half' is no number", "--cut_to=0.5,0"]),
        (["--cut_to="], ["--cut_to=", "1 to 8"]),
        (["--cut_to=.1,.2,.3,.4,.5,.6,.7,.8,.9"], ["9 factors", "1 to 8"]),
        (["--sequences=0"], ["--sequences=0", "at least 1", "-1 for all"]),
        (["--sequences=-2"], ["--sequences=-2", "at least 1"]),
        (["--sequences=2.5"], ["sequences", "2.5"]),
        (["--budget=half"], ["budget", "half"]),
        ([], ["--workdir=", "no checkpoint", "train.py"]),
    ],
    ids=str,
)
def test_refused_before_the_checkpoint_is_looked_for(tmp_path, arguments, said):
    workdir = tmp_path / "run"
    assert_refused(run_here([COMMAND, f"--workdir={workdir}", *arguments], tmp_path), *said)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cut_to=1"], ["--cut_to=1 ", "the largest is 1.0"]),
        # The smallest widths there are: 4 · 8 of 4 · 32 channels.
        (["--cut_to=0.25", "--budget=0.2"], ["--budget=0.2 ", "at least 0.25 "]),
        (["--budget=1.5"], ["--budget=1.5", "[0, 1]"]),
        (["--budget=-0.5"], ["--budget=-0.5", "[0, 1]"]),
        (["--budget=nan"], ["--budget=nan", "[0, 1]"]),
        (["--speedup=2"], ["--speedup needs a --workload"]),
        (["--chip=v5p"], ["--chip needs a --workload"]),
        (["--workload=decode"], ["--workload=decode needs a --chip", "--link_latency"]),
        (["--workload=decode", "--flops=1"], ["--memory_rate"]),
        (["--workload=decode", "--chip=v5q"], ["--chip=v5q", "nearest is v5"]),
        (["--workload=decode", "--chip=v5p", "--devices=3"], ["--devices=3", "8 shards"]),
        (["--workload=decode", "--chip=v5p", "--devices=16"], ["--batch=1", "multiple of 2"]),
        (["--workload=decode", "--chip=v5p", "--length=0"], ["--length=0", "at least 1"]),
        (["--workload=decode", "--chip=v5p", "--speedup=0.5"], ["--speedup=0.5", "from 1 on"]),
        (["--workload=decode", "--chip=v5p", "--speedup=9"], ["--speedup=9", "out of reach"]),
    ],
    ids=str,
)
def test_refused_for_this_checkpoint(workdir, tmp_path, arguments, said):
    before = sorted(workdir.rglob("*"))
    assert_refused(run_here([COMMAND, f"--workdir={workdir}", *arguments], tmp_path), *said)
    assert sorted(workdir.rglob("*")) == before


def test_smallest_budget_that_is_possible_is_named():
    model = models.small_config(model=dict(sync_factor=1.0, embed_dim=48)).model
    with pytest.raises(InputError) as error:
        plans.budget_limit(0.3, model, [0.3125 + 1 / 48])  # D_s = 16
    named = float(re.search(r"at least (\S+) is possible", str(error.value))[1])
    plans.budget_limit(named, model, [1 / 3])
