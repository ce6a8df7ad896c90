"""Questions show what the documents hold; the table is the paired comparison."""

import collections
import json

import pytest

from benchmarks import cloze_tasks
from caat_jax.sweep import plan as sweep_plan
from configs import equivalence

LINES = [
    f"    shard{n}[{n}] = sums({{'left{n}': {n}}})  # partial sums of every shard"
    + "\n        nested = alpha + other + gamma"
    for n in range(40)
]
DOCUMENT = "def private_channels(stream):\n" + "\n".join(LINES) + "\n"


@pytest.fixture(scope="module")
def questions():
    return cloze_tasks.questions_of([DOCUMENT])


def test_the_right_answer_is_what_the_document_holds(questions):
    assert questions.keys() == {"word", "bracket", "indentation"}
    for asked in questions.values():
        assert 20 < len(asked) <= cloze_tasks.QUESTIONS
        for question in asked:
            assert len(question.context) == cloze_tasks.CONTEXT
            wholes = [question.context + answer in DOCUMENT for answer in question.answers]
            assert wholes == [n == question.right for n in range(len(wholes))]


def test_answers_differ_in_what_is_asked_alone(questions):
    for question in questions["word"]:
        assert len(set(question.answers)) == 4
        assert len({len(answer) for answer in question.answers}) == 1
    for question in questions["indentation"]:
        assert len({answer.strip() for answer in question.answers}) == 1
        assert {len(a) - len(a.lstrip()) - 1 for a in question.answers} <= {0, 4, 8, 12, 16}
        assert len(set(question.answers)) == 3


def test_chance_is_the_same_for_every_answer(questions):
    brackets = collections.Counter(q.answers[q.right] for q in questions["bracket"])
    assert set(brackets) == set(")]}") and len(set(brackets.values())) == 1
    places = collections.Counter(q.right for q in questions["word"])
    assert set(places) == {0, 1, 2, 3} and min(places.values()) > len(questions["word"]) / 8


def test_documents_without_brackets_or_indented_lines():
    text = "plain words of every kind, such as these, fill this line and the lines below it\n" * 9
    assert cloze_tasks.questions_of([text]).keys() == {"word"}
    assert cloze_tasks.questions_of([DOCUMENT]) == cloze_tasks.questions_of([DOCUMENT])


def test_tasks_are_files_of_the_harness(questions, tmp_path):
    yaml = pytest.importorskip("yaml")
    names = cloze_tasks.write_tasks(questions, tmp_path)
    for name, asked in zip(names, questions.values(), strict=True):
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        lines = open(task["dataset_kwargs"]["data_files"]).read().splitlines()
        assert task["task"] == name and len(lines) == len(asked)
        assert json.loads(lines[0]) == asked[0]._asdict()


def test_table_compares_pair_by_pair():
    plan = sweep_plan.resolve(equivalence.get_config())
    accuracies = {(1.0, 8): (0.5, 0.6, 0.7), (0.5, 8): (0.52, 0.6, 0.71)}
    rows = [
        cloze_tasks.Row(setting, seed, "caat_word", 100, accuracy, 0.05)
        for setting, of_seed in accuracies.items()
        for seed, accuracy in enumerate(of_seed)
    ]
    baseline, half = cloze_tasks.table(plan, rows).splitlines()[2:]
    assert baseline == "| caat_word | 1.0 | 8 | 3 | 0.600 | 0.050 |  |"
    # scipy.stats.ttest_rel gives [-0.0148, 0.0348].
    assert half == "| caat_word | 0.5 | 8 | 3 | 0.610 | 0.050 | +0.010 ± 0.025 |"
