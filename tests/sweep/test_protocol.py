"""The protocol errs as rarely as it says, and its numbers are those of scipy's tests."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from caat_jax.errors import InputError
from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep import protocol, registration, report
from configs import equivalence

MARGIN = 0.01
SPREAD = 0.01  # of the differences over the pairs


def shares(gap: float, looks: tuple[int, ...], studies: int = 1000) -> dict[str, float]:
    """How many of so many simulated studies reach each verdict."""
    random = np.random.default_rng(0)
    words = [
        protocol.judge(random.normal(gap, SPREAD, looks[-1]), MARGIN, looks).word
        for _ in range(studies)
    ]
    return {word: words.count(word) / studies for word in set(words)}


@pytest.mark.parametrize("looks", [(12,), (4, 8, 12)], ids=["one look", "three looks"])
def test_error_rates(looks):
    at_margin = shares(MARGIN, looks)
    # 5 %, and what 1,000 studies of chance add in one case of 200.
    most = protocol.ERROR + 2.6 * math.sqrt(protocol.ERROR * (1 - protocol.ERROR) / 1000)
    assert at_margin[protocol.NOT_WORSE] <= most
    assert at_margin[protocol.WORSE] <= most
    assert shares(0.0, looks)[protocol.NOT_WORSE] >= protocol.POWER
    assert shares(2 * MARGIN, looks)[protocol.WORSE] >= protocol.POWER


def test_bounds_are_those_of_the_one_sided_tests():
    differences = np.random.default_rng(1).normal(0.0, 1.0, 9)
    verdict = protocol.judge([*differences, 1e9], 0.8, (3, 6, 9, 12))
    assert verdict.pairs == 9 and verdict.difference == pytest.approx(differences.mean())
    for side, bound in (("less", verdict.upper), ("greater", verdict.lower)):
        # At its own bound, a one-sided test is just significant.
        p = stats.ttest_1samp(differences, bound, alternative=side).pvalue
        assert p == pytest.approx(protocol.ERROR / 4)


@pytest.mark.parametrize(
    ("gap", "word"), [(-0.1, protocol.NOT_WORSE), (0.1, protocol.WORSE), (0.01, "undecided")]
)
def test_first_look_that_decides_is_the_last(gap, word):
    differences = [gap - 0.001, gap + 0.001] * 6
    verdict = protocol.judge(differences, MARGIN, (4, 8, 12))
    assert (verdict.word, verdict.pairs) == (word, 12 if word == "undecided" else 4)
    assert protocol.judge(differences[:3], MARGIN, (4, 8, 12)) is None


@pytest.mark.parametrize("spread", [0.008, 0.012, 0.03])
def test_pairs_needed_reach_the_power(spread):
    def power(pairs, error=0.05):
        shift = MARGIN * math.sqrt(pairs) / spread
        return stats.nct.sf(stats.t.ppf(1 - error, pairs - 1), pairs - 1, shift)

    pairs = protocol.pairs_for(spread, MARGIN, 0.05)
    assert power(pairs) > protocol.POWER - 0.005 and power(pairs - 2) < protocol.POWER


def test_pairs_needed_of_an_undecided_study():
    # The mean lies at the margin's half: four times as many pairs as for a mean of 0.
    differences = [MARGIN / 2 + d for d in (-0.012, 0.012) * 6]
    verdict = protocol.judge(differences, MARGIN, (12,))
    spread = np.std(differences, ddof=1)
    assert verdict.pairs_needed == protocol.pairs_for(spread, MARGIN / 2, 0.05) - 12 > 0
    at_margin = protocol.judge([MARGIN - 1e-9, MARGIN + 1e-9] * 6, MARGIN, (12,))
    assert (at_margin.word, at_margin.pairs_needed) == (protocol.UNDECIDED, None)


def test_a_loss_that_is_not_finite_decides_nothing():
    verdict = protocol.judge([-1.0] * 11 + [math.nan], MARGIN, (12,))
    assert (verdict.word, verdict.pairs_needed) == (protocol.UNDECIDED, None)


def test_steps_for_equal_loss():
    steps = np.arange(10, 401, 10)
    baseline = 5.0 - steps / 100
    # 1.25 times slower: at its end it is where the baseline was at step 320.
    slower = 5.0 - steps / 125
    assert protocol.equal_loss_steps(steps, slower, baseline) == pytest.approx(1.25)
    assert protocol.equal_loss_steps(steps, baseline, slower) == pytest.approx(0.8)
    assert protocol.equal_loss_steps(steps, baseline, baseline) == 1
    assert math.isnan(protocol.equal_loss_steps(steps, np.full(40, math.nan), baseline))


@pytest.fixture(scope="module")
def plan():
    config = equivalence.get_config()
    config.grid.model.sync_factor = (1.0, 0.75, 0.5, 0.25, 0.0)
    config.grid.seed = tuple(range(12))
    return sweep_plan.resolve(config)


def with_results(plan, workdir, seeds, losses):
    """Writes what runs of these seeds would leave; `losses` by p."""
    for run in plan.runs:
        if run.seed in seeds:
            p = run.setting[0]
            loss = losses[p] + (0.002 * (-1) ** run.seed if p < 1 else 0.0)
            folder = report.run_folder(workdir, run)
            folder.mkdir(parents=True, exist_ok=True)
            found = {"losses": [9.0] * 3 + [loss] * 2, "tokens": 1, "wire_bytes": 1}
            (folder / "result.json").write_text(json.dumps(found))


def test_decided_settings_are_not_trained_further(plan, tmp_path):
    assert len(report.undecided_runs(plan, 4, tmp_path)) == 4 * 5
    losses = {1.0: 1.0, 0.75: 1.01, 0.5: 1.0, 0.25: 1.01, 0.0: 1.1}
    with_results(plan, tmp_path, range(4), losses)
    results = report.read(plan, tmp_path)
    words = {setting[0]: v.word for setting, v in report.verdicts(plan, results).items()}
    assert words == {0.75: "undecided", 0.5: "not worse", 0.25: "undecided", 0.0: "worse"}
    runs = report.undecided_runs(plan, 8, tmp_path)
    assert {run.setting[0] for run in runs} == {1.0, 0.75, 0.25}
    assert {run.seed for run in runs} == set(range(8))
    with_results(plan, tmp_path, range(12), losses | {0.75: 1.0, 0.25: 1.0})
    assert report.undecided_runs(plan, 12, tmp_path) == []
    table = report.table(plan, report.summarise(plan, results))
    assert [table.count(word) for word in (" worse |", "not worse |", "undecided: ")] == [2, 1, 2]


def test_pairs_count_in_the_order_of_the_plan(plan):
    """However the runs end: a study cannot choose the pairs that suit it."""
    results = [
        report.Result(run.setting, run.seed, 1, 1, (1.0,) * 5)
        for run in plan.runs
        if run.seed in (0, 1, 2, 4, 5, 6, 7)
    ]
    assert set(report.verdicts(plan, results).values()) == {None}
    assert "no look yet" in report.table(plan, report.summarise(plan, results))


def test_registered_plan_stays(plan, tmp_path):
    registration.register(plan, tmp_path)
    path = tmp_path / registration.PLAN_FILE
    first = path.read_text()
    registration.register(plan, tmp_path)
    assert path.read_text() == first
    registered = json.loads(first)
    assert registered["margin"] == 0.01 and registered["pairs at each look"] == [4, 8, 12]
    assert registered["seeds"] == list(range(12)) and len(registered["settings"]) == 5
    with pytest.raises(InputError, match=r"margin: registered 0\.01, requested 0\.02"):
        registration.register(plan._replace(margin=0.02), tmp_path)
    assert path.read_text() == first
    # That of a version without the field `compute.batch_parts`; that of another run.
    del registered["run"]["compute"]["batch_parts"]
    path.write_text(json.dumps(registered))
    registration.register(plan, tmp_path)
    registered["run"]["compute"]["remat"] = True
    path.write_text(json.dumps(registered))
    with pytest.raises(InputError, match=r"\(compute\.remat: stored True, requested False\)"):
        registration.register(plan, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("margin", -0.01, "config.margin=-0.01 must be at least 0"),
        ("margin", "small", "config.margin='small' must be of type float"),
        ("margin", 0.0, "config.looks=3 without a config.margin must be 1"),
        ("looks", 7, "config.looks=7 at 12 seeds; a verdict takes at least 2 seeds for each look"),
        ("looks", 0, "config.looks=0 must be at least 1"),
        ("late_evaluations", 6, "config.late_evaluations=6 is more than the 5 of the run sync"),
        ("late_evaluations", 1.5, "config.late_evaluations=1.5 must be of type int"),
    ],
)
def test_refused(name, value, said):
    config = equivalence.get_config()
    with config.unlocked(), config.ignore_type():
        config[name] = value
    with pytest.raises(InputError) as error:
        sweep_plan.resolve(config)
    assert said in str(error.value)
