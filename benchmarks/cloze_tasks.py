"""Questions made of documents by rules, and written as tasks of the lm-evaluation-harness."""

import csv
import io
import json
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from caat_jax import files
from caat_jax.sweep.plan import Plan

CONTEXT = 100  # characters shown before the place
QUESTIONS = 300  # of each task, at most

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {questions}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


class Question(NamedTuple):
    """A place in a document, and what may follow."""

    context: str
    answers: list[str]
    right: int  # which of them does


class Row(NamedTuple):
    """One task on one run."""

    setting: tuple[Any, ...]
    seed: int
    task: str
    questions: int
    accuracy: float
    standard_error: float


def questions_of(documents: Sequence[str]) -> dict[str, list[Question]]:
    """Those of each task, the same for the same documents."""
    rules = {"word": _words, "bracket": _brackets, "indentation": _indentations}
    questions = {}
    for name, rule in rules.items():
        chance = random.Random(name)
        found = [q for document in documents for q in rule(document, chance)]
        chance.shuffle(found)
        if name == "bracket":
            found = _as_many_of_each(found)
        if found:
            questions[name] = found[:QUESTIONS]
    return questions


def _question(
    document: str, place: int, right: str, wrong: list[str], chance: random.Random
) -> Question:
    answers = [right, *wrong]
    chance.shuffle(answers)
    return Question(document[max(place - CONTEXT, 0) : place], answers, answers.index(right))


def _words(document: str, chance: random.Random) -> Iterator[Question]:
    of_length: dict[int, set[str]] = {}
    places = [m for m in re.finditer(r"[A-Za-z]{4,}", document) if m.start() >= CONTEXT]
    for match in places:
        of_length.setdefault(len(match[0]), set()).add(match[0])
    for match in places:
        others = sorted(of_length[len(match[0])] - {match[0]})
        if len(others) >= 3:
            wrong = chance.sample(others, 3)
            yield _question(document, match.start(), match[0], wrong, chance)


def _brackets(document: str, chance: random.Random) -> Iterator[Question]:
    for match in re.finditer(r"[)\]}]", document):
        if match.start() >= CONTEXT:
            wrong = [bracket for bracket in ")]}" if bracket != match[0]]
            yield _question(document, match.start(), match[0], wrong, chance)


def _as_many_of_each(questions: list[Question]) -> list[Question]:
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.answers[question.right], []).append(question)
    return [q for together in zip(*kinds.values(), strict=False) for q in together]


def _indentations(document: str, chance: random.Random) -> Iterator[Question]:
    for match in re.finditer(r"\n( *)(\S[^\n]{,11})", document):
        columns = len(match[1])
        if match.start() >= CONTEXT and columns and columns % 4 == 0:
            near = sorted(range(0, columns + 9, 4), key=lambda n: (abs(n - columns), n))[1:3]
            right, *wrong = (f"\n{' ' * n}{match[2]}" for n in (columns, *near))
            yield _question(document, match.start(), right, wrong, chance)


def write_tasks(questions: dict[str, list[Question]], folder: Path) -> list[str]:
    """Writes a harness task for each; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for kind, asked in questions.items():
        name, path = f"caat_{kind}", folder / f"{kind}.jsonl"
        files.write(path, "".join(json.dumps(question._asdict()) + "\n" for question in asked))
        files.write(folder / f"{name}.yaml", _TASK.format(name=name, questions=path.resolve()))
        names.append(name)
    return names


def write_csv(path: Path, plan: Plan, rows: Sequence[Row]) -> None:
    """A line for each row."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*plan.fields, *Row._fields[1:]])
    writer.writerows([*row.setting, *row[1:]] for row in rows)
    files.write(path, text.getvalue())


def table(plan: Plan, rows: Sequence[Row]) -> str:
    """A Markdown table: every task by setting, over the pairs."""
    accuracy = {(row.setting, row.task, row.seed): row.accuracy for row in rows}
    heads = ["task", *(field.split(".")[-1] for field in plan.fields), "pairs", "right"]
    heads += ["standard error", f"minus {plan.compared.split('.')[-1]}={plan.baseline}"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for task, setting in dict.fromkeys((row.task, row.setting) for row in rows):
        baseline = plan.baseline_of(setting)
        own = [row for row in rows if (row.task, row.setting) == (task, setting)]
        pairs = [row for row in own if (baseline, task, row.seed) in accuracy]
        cells = [task, *setting, len(pairs), f"{statistics.fmean(r.accuracy for r in own):.3f}"]
        cells.append(f"{statistics.fmean(r.standard_error for r in own):.3f}")
        differences = [r.accuracy - accuracy[baseline, task, r.seed] for r in pairs]
        cells.append("" if setting == baseline else _interval(differences))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _interval(differences: Sequence[float]) -> str:
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}"
    reach = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean:+.3f} ± {reach:.3f}"
