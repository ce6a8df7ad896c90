"""A sweep does every run of its grid once, as train.py would; its statistics are the textbook's."""

import csv
import itertools
import json
import math
import signal

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from caat_jax.config.resolve import resolve
from caat_jax.errors import InputError
from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep import report
from configs import base, equivalence_widths, sweep, sweep_half, sweep_quarter, sweep_wires
from tests import runs
from tests.command_line import REPOSITORY, assert_refused, run_here, start_forked, write_texts
from tests.runs import Run

P, S = "model.sync_factor", "model.tp_shards"
FACTORS, SEEDS, STEPS = (1.0, 0.5), (0, 1), 6
NAMES = [f"sync_factor_{p}-seed_{seed}" for seed, p in itertools.product(SEEDS, FACTORS)]
MARGIN = 0.01

CONFIG_FILE = """
from ml_collections import ConfigDict
from configs import base

def get_config():
    run = base.get_config()
    run.update_from_flattened_dict({fields})
    grid = ConfigDict(dict(model=dict(sync_factor={factors}), seed={seeds}))
    return ConfigDict(
        dict(
            run=run,
            grid=grid,
            compared="model.sync_factor",
            margin={margin},
            looks=1,
            late_evaluations=2,
        )
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus and a sweep's configuration."""
    folder = tmp_path_factory.mktemp("sweep")
    write_texts(folder / "texts")
    (folder / "sweep.py").write_text(
        CONFIG_FILE.format(fields=fields_of(folder), factors=FACTORS, seeds=SEEDS, margin=MARGIN)
    )
    return folder


def fields_of(folder):
    return runs.SMALL | {
        "model.layers": 1,
        "compute.scan_layers": False,
        "data.files": f"{folder}/texts/*.txt",
        "data.cache_dir": f"{folder}/cache",
        "optimizer.decay_steps": -1,
        "train.steps": STEPS,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
    }


def command(place, *flags):
    return ["caat_jax/sweep/__main__.py", f"--config={place}/sweep.py", *flags]


class Sweep:
    """The command, on the configuration of `place`."""

    def __init__(self, place, *flags):
        self.outputs = [place / "stdout", place / "stderr"]
        for path in self.outputs:
            path.write_text("")
        # Its runs are processes started anew.
        environment = {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
        self.process = start_forked(command(place, *flags), place, self.outputs, environment)

    def result(self):
        self.process.join(300)
        return self.process.exitcode, *(path.read_text() for path in self.outputs)


@pytest.fixture(scope="module")
def done(place):
    """A sweep's folder, after one of its runs was done alone and then all; what it printed."""
    assert Sweep(place, "--workdir=done", f"--only={NAMES[3]}").result()[0] == 0
    before = (place / "done/runs" / NAMES[3] / "metrics.jsonl").stat().st_mtime_ns
    code, stdout, stderr = Sweep(place, "--workdir=done", "--jobs=2").result()
    assert code == 0, stderr
    assert (place / "done/runs" / NAMES[3] / "metrics.jsonl").stat().st_mtime_ns == before
    return place / "done", stdout


def test_runs_are_those_of_train_py(done, place):
    folder, _ = done
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(NAMES)
    alone = Run(place / "alone", fields_of(place) | {P: 0.5, "seed": 1}, devices=0)
    assert alone.wait() == 0, alone.output
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        expected = runs.series(place / "alone", name)
        assert runs.series(folder / "runs" / NAMES[3], name) == expected != {}


def test_results_are_those_of_the_runs(done):
    folder, stdout = done
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row, name in zip(rows, NAMES, strict=True):
        assert name == f"sync_factor_{row[P]}-seed_{row['seed']}"
        evaluated = runs.series(folder / "runs" / name, "eval/loss")
        assert row["losses"] == " ".join(f"{loss:.6f}" for loss in evaluated.values())
        assert int(row["tokens"]) == STEPS * runs.BATCH * runs.LENGTH
    late = {p: [r["losses"].split()[-2:] for r in rows if float(r[P]) == p] for p in FACTORS}
    means = [np.mean(np.array(late[p], float)) for p in FACTORS]
    assert [f"{mean:.4f}" in stdout for mean in means] == [True, True]
    assert f"{means[1] - means[0]:+.4f}" in stdout
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["margin"], plan["seeds"]) == (MARGIN, [0, 1])
    assert (folder / "plan.json").stat().st_mtime_ns < min(
        (folder / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in NAMES
    )
    assert matplotlib.image.imread(folder / "sweep.png").std() > 0


def test_another_configuration_in_the_same_folder(done, place):
    flags = ["--workdir=done", "--config.run.train.steps=7"]
    result = run_here(command(place, *flags), place)
    assert_refused(result, NAMES[0], "train.steps: stored 6, requested 7", "--workdir")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.run.data.files=none/*.txt"], "none/*.txt matches no file"),
        (
            [
                "--config.run.train.skipped_updates_allowed=0",
                "--config.run.optimizer.peak_learning_rate=1e38",
            ],
            "not finite at 1 steps in a row",
        ),
    ],
    ids=["no data", "divergence"],
)
def test_failed_runs_are_named(place, flags, said):
    flags = [*flags, "--config.grid.seed=(0,)", "--config.margin=0", "--workdir=failed", "--jobs=2"]
    assert_refused(Sweep(place, *flags).result(), "2 of 2 runs failed", NAMES[0], said)


@pytest.mark.slow
def test_stopped_sweep_goes_on(place):
    flags = ["--config.run.train.steps=3000", "--config.run.train.eval_every=3000"]
    flags += ["--config.run.train.checkpoint_every=3000", "--config.grid.seed=(0,)", "--jobs=2"]
    flags += ["--config.margin=0"]
    undisturbed = Sweep(place, *flags, "--workdir=undisturbed")
    assert undisturbed.result()[0] == 0
    stopped = Sweep(place, *flags, "--workdir=stopped")
    folders = [place / "stopped/runs" / name for name in NAMES[:2]]
    while not all(runs.has_metrics(folder) for folder in folders):
        assert stopped.process.is_alive(), stopped.result()
    stopped.process.terminate()
    code, _, stderr = stopped.result()
    assert (code, stderr) == (75, "stopped; the same command resumes\n")
    assert all(0 < runs.last_step(folder) < 3000 for folder in folders)
    assert Sweep(place, *flags, "--workdir=stopped").result()[0] == 0
    for folder in folders:
        expected = place / "undisturbed/runs" / folder.name
        assert runs.series(folder, "train/loss") == runs.series(expected, "train/loss")
        assert (folder / "result.json").read_text() == (expected / "result.json").read_text()


@pytest.mark.slow
def test_interrupt_while_runs_start(place):
    started = Sweep(place, "--workdir=interrupted", "--jobs=2")
    while not (place / "interrupted/runs" / NAMES[1]).exists():
        assert started.process.is_alive(), started.result()
    started.process.terminate()
    assert started.process.join(60) is None
    assert started.process.exitcode in (75, -signal.SIGTERM)
    assert not list((place / "interrupted/runs").glob("*/result.json"))


def test_shipped_configuration():
    plan = sweep_plan.resolve(sweep.get_config())
    assert (len(plan.runs), plan.compared, plan.baseline) == (30, P, 1.0)
    assert {run.setting for run in plan.runs} == set(
        itertools.product((1.0, 0.75, 0.5, 0.25, 0.0), (4, 8))
    )
    assert {run.config.seed for run in plan.runs} == {0, 1, 2}
    for run in plan.runs:
        assert (run.config.model.sync_factors[0][0], run.config.model.tp_shards) == run.setting


def test_shipped_halves():
    plan = sweep_plan.resolve(sweep_half.get_config())
    assert len(plan.runs) == 18
    for run in plan.runs:
        widths = {
            sum(map(sum, run.config.at_step(n).model.sync_widths)) for n in (1, 600, 601, 1200)
        }
        all_channels = 4 * 2 * 128
        schedule = run.settings["train.sync_schedule"]
        expected = {1200: {all_channels}, 600: {all_channels, all_channels // 2}}
        assert widths == (expected[schedule[0][0]] if schedule else {all_channels // 2})


def test_shipped_quarters():
    plan = sweep_plan.resolve(sweep_quarter.get_config())
    assert len(plan.runs) == 12
    for run in plan.runs:
        widths = [sum(map(sum, run.config.at_step(n).model.sync_widths)) for n in (600, 601)]
        all_channels = 4 * 2 * 128
        first = 1 if run.settings["train.sync_schedule"] else 0.25
        assert widths == [first * all_channels, 0.25 * all_channels]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_shipped_widths(width):
    plan = sweep_plan.resolve(equivalence_widths.get_config(str(width)))
    assert len(plan.runs) == 12
    for run in plan.runs:
        assert (run.config.model.embed_dim, run.config.model.mlp_dim) == (width, 3 * width)
    peaks = {run.config.optimizer.peak_learning_rate * width for run in plan.runs}
    assert sorted(peaks) == pytest.approx([0.096, 0.192, 0.384])


def test_shipped_wires():
    plan = sweep_plan.resolve(sweep_wires.get_config())
    assert {run.setting for run in plan.runs} == set(
        itertools.product(("float32", "int8", "float8_e4m3fn"), repeat=2)
    )
    assert len(plan.runs) == 27 and all(run.config.compute.emulate_wires for run in plan.runs)


def grid(**changes):
    config = sweep.get_config()
    with config.unlocked():
        for name, value in changes.items():
            config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid__model__layer": (1, 2)}, ["config.model.layer is not", "config.model.layers"]),
        ({"grid__model__heads": 8}, ["config.grid.model.heads=8", "tuple"]),
        ({"grid__seed": ()}, ["config.grid.seed=()", "tuple of values"]),
        ({"grid__model__sync_factor": (1.0, 2.0)}, ["model.sync_factor=2.0", "[0, 1]"]),
        ({"grid__model__sync_factor": (1.0, "half")}, ["config.grid.model.sync_factor", "half"]),
        ({"grid__model__mlp_dim": (8, 12)}, ["model.mlp_dim=12", "model.tp_shards=8"]),
        ({"grid__seed": (1, 1)}, ["seed_1", "twice"]),
        ({"compared": "model.layers"}, ["config.compared='model.layers'", P, S]),
        ({"compared": "seed"}, ["config.compared='seed'", P]),
        ({"more": 1}, ["grid, late_evaluations, looks, margin, more, run", "configs/sweep.py"]),
    ],
)
def test_refused(changes, said):
    with pytest.raises(InputError) as error:
        sweep_plan.resolve(grid(**changes))
    assert [part for part in said if part not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.run.model.head=8"], ["config.run.model.head", "config.run.model.heads"]),
        (["--config.model.heads=8"], ["config.model.heads is not a field", "run.model.heads"]),
        (["--config.run.model.heads=12"], ["model.heads=12", "model.tp_shards=8"]),
        (["--only=seed_7"], ["--only=seed_7", "4 runs", "--list"]),
        (["--jobs=0"], ["jobs"]),
    ],
)
def test_refused_as_users_see_it(place, flags, said):
    assert_refused(run_here(command(place, "--workdir=refused", *flags), place), *said)
    assert not (place / "refused").exists()


def test_list(place):
    code, stdout, _ = run_here(command(place, "--workdir=listed", "--list"), place)
    assert (code, stdout.split()) == (0, NAMES)
    assert not (place / "listed").exists()


def test_names_of_long_values_are_short_and_differ():
    layers = [tuple((p, 0.125 * n) for n in range(4)) for p in (0.25, 0.5)]
    plan = sweep_plan.resolve(grid(grid__model__sync_factor_per_layer=((), *layers)))
    names = {run.name for run in plan.runs}
    assert len(names) == len(plan.runs) == 90
    assert all(len(name) < 120 and "/" not in name and " " not in name for name in names)


def plan_of(factors, shards, seeds):
    changes = {"grid__model__sync_factor": factors, "grid__model__tp_shards": shards}
    return sweep_plan.resolve(grid(**changes, grid__seed=seeds))


def curve(last):
    """What a run of `configs/sweep.py` measures: 12 losses."""
    return (9.0,) * 11 + (last,)


def test_statistics_are_those_of_the_paired_t_test():
    plan = plan_of((1.0, 0.5), (4, 8), (0, 1, 2, 3))
    random = np.random.default_rng(0)
    results = [
        report.Result(run.setting, run.seed, 10, 20, curve(random.normal(2.0, 0.1)))
        for run in plan.runs
    ]
    summaries = {s.setting: s for s in report.summarise(plan, results)}
    losses = {
        setting: [r.losses[-1] for r in results if r.setting == setting] for setting in summaries
    }
    for (p, shards), summary in summaries.items():
        assert summary.loss == pytest.approx(np.mean(losses[p, shards]))
        assert summary.spread == pytest.approx(np.std(losses[p, shards], ddof=1))
        if p == 1.0:
            assert (summary.difference, summary.lower, summary.upper) == (0, 0, 0)
            continue
        interval = stats.ttest_rel(losses[p, shards], losses[1.0, shards]).confidence_interval(0.95)
        assert (summary.lower, summary.upper) == pytest.approx((interval.low, interval.high))


def test_one_seed_has_no_interval():
    plan = plan_of((1.0, 0.5), (8,), (0,))
    results = [report.Result(r.setting, 0, 1, 1, curve(2.0 + r.setting[0])) for r in plan.runs]
    summaries = report.summarise(plan, results)
    assert math.isnan(summaries[1].lower) and summaries[1].difference == -0.5
    assert "nan" not in report.table(plan, summaries)
    assert "-0.5000 |" in report.table(plan, summaries)


@pytest.mark.parametrize("shards", [2, 8])
def test_wire_bytes_are_those_of_the_method(shards):
    """Of every sublayer two all-reduces of [B, T, D_s] float32, in the ring's bytes."""

    def sent(p, schedule=()):
        config = base.get_config()
        fields = {P: p, S: shards, "model.layers": 3, "train.sync_schedule": schedule}
        config.update_from_flattened_dict(fields)
        return report.wire_bytes(resolve(config), steps=10)

    one = 4 * 16 * 256 * 256  # B·T·D
    ring = 2 * (shards - 1) / shards
    for p in (0.75, 0.5, 0.25):
        assert sent(1.0) - sent(p) == 10 * 3 * 2 * 2 * (1 - p) * one * ring
    # Four steps at p = 1, three at 0.25 and three at 0.5.
    saved = sent(1.0) - sent(0.5, ((4, 1.0), (7, 0.25), (70, 0.5)))
    assert saved == (3 * 0.75 + 3 * 0.5) * 3 * 2 * 2 * one * ring
    assert sent(0.5, ((10, 1.0), (12, 0.25))) == sent(1.0)


def test_results_file_of_a_run_is_read_back(tmp_path):
    plan = plan_of((1.0,), (8,), (0,))
    folder = report.run_folder(tmp_path, plan.runs[0])
    folder.mkdir(parents=True)
    found = {"losses": [1.0] * 11 + ["nan"], "tokens": 3, "wire_bytes": 4}
    (folder / "result.json").write_text(json.dumps(found))
    assert "nan" in report.write(plan, tmp_path)


def test_result_of_another_version(tmp_path):
    plan = plan_of((1.0,), (8,), (0,))
    folder = report.run_folder(tmp_path, plan.runs[0])
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"loss": 1.0, "tokens": 3, "wire_bytes": 4}')
    with pytest.raises(InputError, match=r"result\.json has no losses: .* delete it"):
        report.read(plan, tmp_path)
