"""The lm-evaluation-harness on a small trained model: the adapter, local tasks, what is refused."""

import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.evaluation.scoring import Scorer
from caat_jax.inference.sampling import Sampling
from tests import models, reference
from tests.command_line import REPOSITORY

pytest.importorskip("lm_eval")
# Before the libraries that read them are imported: nothing here may ask a network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
harness = importlib.import_module("caat_jax.evaluation.harness")


TOKENIZER = load_tokenizer("bytes")
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
TEXTS = [f"the shards of number {n} sum what they share. " * (1 + n % 3) for n in range(24)]
LENGTH = 64
MESHES = {"M=1": dict(data=1, model=1), "M=8": dict(data=1, model=8), "2x4": dict(data=2, model=4)}

QUESTIONS = [
    {"given": "the shards of", "choices": ["number", "nobody"], "answer": 0},
    {"given": "they share what", "choices": ["zebras", "they sum"], "answer": 1},
    {"given": "a private channel is", "choices": ["shared", "kept", "lost"], "answer": 1},
]
PASSAGES = [
    {"text": "the shards sum what they share"},
    {"text": "number two keeps the rest, as private channels, to the end of all layers. " * 2},
]
CHOICE_TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {folder}/questions.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{given}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
TEXT_TASK = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {folder}/passages.jsonl}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
GENERATION_TASK = """
task: own_generation
dataset_path: json
dataset_kwargs: {{data_files: {folder}/questions.jsonl}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{given}}}}"
doc_to_target: " number"
generation_kwargs: {{until: [" s"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
GROUP = "group: own\ntask: [own_choice, own_text]\n"
LONG_TASK = GENERATION_TASK.replace("own_generation", "own_long").replace("max_gen_toks: 12, ", "")
BEAM_TASK = GENERATION_TASK.replace("own_generation", "own_beams").replace(
    "do_sample: false", "num_beams: 3"
)
BROKEN_TASK = CHOICE_TASK.replace("own_choice", "own_broken").replace("questions", "nothing")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    fields = {"mesh.simulated_devices": 8}  # for eval.py; here they are there already
    return models.small_run(tmp_path_factory.mktemp("run"), TEXTS, fields)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, and an environment in which the data sets' cache is beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in (("questions", QUESTIONS), ("passages", PASSAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"choice": CHOICE_TASK, "text": TEXT_TASK, "broken": BROKEN_TASK, "own": GROUP}
    files |= {"generation": GENERATION_TASK, "long": LONG_TASK, "beams": BEAM_TASK}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content.format(folder=folder))
    return folder


@pytest.fixture
def local_tasks(tasks, monkeypatch):
    """Indexing the 14,000 tasks that the harness brings takes seconds; these are enough."""
    manager = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", manager)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tasks / "cache")


def options(folder, *names, **given):
    fields = dict(include_path=folder, num_fewshot=None, limit=None, batch_size=None)
    return harness.TaskOptions(names=names, **fields | given)


@functools.cache
def loaded(workdir, mesh):
    """Programs and parameters."""
    step, config = checkpoint.newest_config(workdir)
    sizes = dataclasses.replace(config.mesh, **MESHES[mesh])
    programs = models.programs(dataclasses.replace(config, mesh=sizes))
    with Checkpoints(workdir) as checkpoints:
        return programs, checkpoints.restore_parameters(step, programs.state_shapes.parameters)


def model(workdir, mesh="M=8", rows=4, generator=None):
    programs, parameters = loaded(workdir, mesh)
    return harness.HarnessModel(Scorer(programs, parameters, rows), TOKENIZER, generator)


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def log_probabilities(workdir, tokens):
    """float64 [T, V]: log p of what follows each of the tokens, by the emulation."""
    programs, parameters = loaded(workdir, "M=8")
    method = models.method(programs.config)
    logits = reference.forward(jax.device_get(parameters), np.array([tokens]), **method).logits[0]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected(workdir, tokens, targets):
    """Log-likelihood and greediness of the last `targets` tokens; the first are cut off."""
    tokens = tokens[-(LENGTH + 1) :]
    rows = log_probabilities(workdir, tokens[:-1])[-targets:]
    chosen = np.array(tokens[-targets:])
    return rows[np.arange(targets), chosen].sum(), bool((rows.argmax(axis=-1) == chosen).all())


def ids(text):
    return [BOS, *text.encode()]


# ---- The adapter ------------------------------------------------------------------------------

PAIRS = [
    ("the shards", " of number"),
    ("the shards ", "of number"),  # the space belongs to the continuation
    ("", "the shards"),
    ("the shards of numb", "e"),
    (TEXTS[2], " and more"),  # too long: loses its beginning
    ("kůň", " žluť"),
    ("x", "y" * LENGTH),
]


@pytest.mark.parametrize(
    "mesh", ["M=8", *(pytest.param(m, marks=pytest.mark.slow) for m in ("M=1", "2x4"))]
)
def test_log_likelihoods_equal_the_emulation(workdir, mesh):
    assert len(TEXTS[2]) > LENGTH
    scores = model(workdir, mesh).loglikelihood(requests(*PAIRS))
    for (context, continuation), score in zip(PAIRS, scores, strict=True):
        spaces = len(context) - len(context.rstrip())
        targets = len(continuation.encode()) + spaces
        log_likelihood, is_greedy = expected(workdir, ids(context + continuation), targets)
        assert score[0] == pytest.approx(log_likelihood, abs=1e-4), (context, continuation)
        assert score[1] is is_greedy


def test_greedy_continuation(workdir):
    byte = int(log_probabilities(workdir, ids("the shards"))[-1].argmax())
    pairs = [("the shards", chr(byte)), ("the shards", chr(byte + 1))]
    assert [s.is_greedy for s in model(workdir).loglikelihood(requests(*pairs))] == [True, False]


def test_batch_size_and_order_change_nothing(workdir):
    once = model(workdir, rows=4).loglikelihood(requests(*PAIRS))
    again = model(workdir, rows=2).loglikelihood(requests(*reversed(PAIRS)))[::-1]
    for score, other in zip(once, again, strict=True):
        # Hundreds of nats, in float32.
        assert score[0] == pytest.approx(other[0], rel=1e-7, abs=1e-5) and score[1] == other[1]


def test_continuation_longer_than_the_model_reads(workdir):
    with pytest.raises(InputError, match=r"65 tokens is longer than.*data\.sequence_length=64"):
        model(workdir).loglikelihood(requests(("x", "y" * (LENGTH + 1))))


def windows_of(text):
    """By hand: tokens and targets, so that each token is predicted once, with T of context."""
    tokens = ids(text)
    windows = [(tokens[: LENGTH + 1], min(LENGTH, len(tokens) - 1))]
    done = LENGTH
    while done < len(tokens) - 1:
        new = min(LENGTH, len(tokens) - 1 - done)
        windows.append((tokens[done + new - LENGTH : done + new + 1], new))
        done += new
    return windows


@pytest.mark.parametrize("mesh", ["M=8", pytest.param("M=1", marks=pytest.mark.slow)])
def test_rolling_log_likelihood_of_long_texts(workdir, mesh):
    texts = ["short", "", (TEXTS[2] * 2)[: LENGTH * 2], (TEXTS[2] * 2)[:150]]
    totals = model(workdir, mesh).loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, total in zip(texts, totals, strict=True):
        windows = windows_of(text) if text else []
        by_hand = sum(expected(workdir, *window)[0] for window in windows)
        assert total == pytest.approx(by_hand, abs=3e-4), text


class FakeGenerator:
    """The most likely token, by one whole forward pass each; notes what it was asked for."""

    def __init__(self, workdir):
        self.workdir, self.calls = workdir, []

    def generate(self, prompts, *, max_new_tokens, stop_ids, **given):
        self.calls.append((prompts, max_new_tokens, stop_ids, given))
        return [self._one(list(prompt), max_new_tokens, stop_ids) for prompt in prompts]

    def _one(self, tokens, count, stop_ids):
        new = []
        while len(new) < count and (not new or new[-1] not in stop_ids):
            padded = (tokens + new + [0] * LENGTH)[:LENGTH]
            programs, parameters = loaded(self.workdir, "M=8")
            rows = greedy_ids(programs)(parameters, np.array([[*padded, 0]], np.int32))
            new.append(int(rows[0, len(tokens + new) - 1]))
        return new


@functools.cache
def greedy_ids(programs):
    """A program: parameters, int32 [1, T + 1] -> int32 [1, T]."""
    from caat_jax.devices import sharding
    from caat_jax.model import loss

    def most_likely(parameters, rows):
        varying = sharding.mark_varying(parameters, programs.blueprint.specs)
        return loss.most_likely(programs.blueprint.bind(varying)(models.inputs(rows)))

    step = programs._shard_map(most_likely, out_specs=programs.batch_sharding.spec)
    return lambda *given: np.asarray(jax.jit(step)(*given))


def test_generated_text_is_greedy_and_cut(workdir):
    fake = FakeGenerator(workdir)
    adapter = model(workdir, rows=2, generator=lambda: fake)
    asked = [
        ("the shards", {"until": [], "max_gen_toks": 6}),
        ("number", {"until": "", "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}),
        ("the", {"max_gen_toks": 6}),
    ]
    texts = adapter.generate_until(requests(*asked))
    for (context, _), text in zip(asked, texts, strict=True):
        assert len(text.encode()) == 6
        ((_, is_greedy),) = adapter.loglikelihood(requests((context, text)))
        assert is_greedy
    # Two at a time, shortest first, all alike; no prompt is touched.
    assert [len(prompts) for prompts, *_ in fake.calls] == [2, 1]
    assert fake.calls[0][0] == [ids("the"), ids("number")]
    assert fake.calls[0][1:3] == (6, (EOS,))
    assert fake.calls[0][3] == dict(sampling=Sampling())

    stop, longer = texts[0][3:5], texts[0][4:6]
    (cut,) = adapter.generate_until(
        requests(("the shards", {"until": [longer, stop], "max_gen_toks": 6}))
    )
    ends = [texts[0].index(s) for s in (stop, longer)]
    assert cut == texts[0][: min(ends)]


def test_generation_options():
    asked_for = []

    def generate(prompts, **given):
        asked_for.append((prompts, given))
        return [[*b"some words", EOS] for _ in prompts]

    scorer = SimpleNamespace(rows=8, sequence_length=16)
    generator = SimpleNamespace(generate=generate)
    adapter = harness.HarnessModel(scorer, TOKENIZER, lambda: generator)
    sampled = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    asked = [
        ("one prompt of many words", {"until": ["\n"], "max_gen_toks": 10}),
        ("two", {"until": [" "], "max_new_tokens": 99, **sampled}),
        ("three", {"until": ["o", "w"], "max_gen_toks": 10, "top_k": None, "num_beams": 1}),
    ]
    assert adapter.generate_until(requests(*asked)) == ["some words", "some", "s"]
    calls = {given["max_new_tokens"]: (prompts, given) for prompts, given in asked_for}
    # Together they fit into 16 tokens, and one token of the prompt is left at least.
    assert calls[10][0] == [ids("three"), list(b" words")]
    assert calls[15][0] == [list(b"o")]
    assert calls[15][1]["sampling"] == Sampling(0.5, top_k=3, top_p=0.9, seed=1)
    with pytest.raises(InputError, match="generation option num_beams"):
        adapter.generate_until(requests(("x", {"num_beams": 2})))


# ---- Tasks ------------------------------------------------------------------------------------


def by_hand(workdir):
    """acc of the questions, bits per byte of the passages."""
    right = 0
    for question in QUESTIONS:
        scores = [
            expected(workdir, ids(f"{question['given']} {choice}"), 1 + len(choice))[0]
            for choice in question["choices"]
        ]
        right += int(np.argmax(scores)) == question["answer"]
    total = sum(expected(workdir, *w)[0] for p in PASSAGES for w in windows_of(p["text"]))
    size = sum(len(passage["text"].encode()) for passage in PASSAGES)
    return right / len(QUESTIONS), -total / math.log(2) / size


@pytest.mark.parametrize(
    "sizes",
    [dict(data=8, model=1), pytest.param(dict(data=1, model=8), marks=pytest.mark.slow)],
    ids=str,
)
def test_local_tasks_on_any_mesh(workdir, tasks, local_tasks, sizes):
    step, config = checkpoint.newest_config(workdir)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    asked = options(tasks, "own_choice", "own_text")
    figures, table = harness.evaluate_tasks(workdir, step, config, asked)
    accuracy, bits = by_hand(workdir)
    assert 0 < accuracy < 1
    assert figures["own_choice"]["metrics"]["acc,none"] == pytest.approx(accuracy)
    assert figures["own_text"]["metrics"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)
    assert "own_choice" in table and f"{accuracy:.4f}" in table and f"{bits:.4f}" in table


def test_group_pattern_limit_and_examples(workdir, tasks, local_tasks):
    step, config = checkpoint.newest_config(workdir)
    asked = options(tasks, "own", limit=2, num_fewshot=1, batch_size=16)
    figures, _ = harness.evaluate_tasks(workdir, step, config, asked)
    assert set(figures) >= {"own_choice", "own_text"}
    choice = figures["own_choice"]
    assert (choice["examples"], choice["num_fewshot"]) == (2, 1)
    assert choice["metrics"]["acc,none"] in (0.0, 0.5, 1.0)

    figures, _ = harness.evaluate_tasks(workdir, step, config, options(tasks, "own_ch*"))
    assert list(figures) == ["own_choice"] and figures["own_choice"]["examples"] == len(QUESTIONS)


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["own_choise"], {}, r"no task 'own_choise'; near it: own_choice"),
        (["own_text", "zzz"], {}, r"no task 'zzz' \(--include_path"),
        (["own_broken"], {}, r"own_broken cannot be loaded \(\w+: .*nothing"),
        (["own", "own_text"], {}, r"own_text.* in both|own_text.*both"),
        (["own_text", "own_long"], {}, r"own_long generates max_gen_toks=256 .*_length=64"),
        (["own_text", "own_beams"], {}, r"generation option num_beams"),
        (["own_text"], {"include_path": Path("nowhere")}, r"--include_path=nowhere is no folder"),
        (["own_text"], {"batch_size": 3}, r"--batch_size=3 must be a multiple of 8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_run(workdir, tasks, local_tasks, names, given, said):
    step, config = checkpoint.newest_config(workdir)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=8, model=1))
    with pytest.raises(InputError, match=said) as caught:
        harness.evaluate_tasks(workdir, step, config, options(tasks, *names, **given))
    assert "\n" not in str(caught.value)


def run_eval(workdir, tasks, *flags):
    environment = os.environ | {"HF_HOME": str(tasks / "home")}
    command = [sys.executable, "eval.py", f"--workdir={workdir}", *flags]
    command.append(f"--include_path={tasks}")
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_eval_py_runs_local_tasks(workdir, tasks):
    """On eight simulated devices, as the run's configuration has it."""
    names = "own_choice,own_text,own_generation"
    code, stdout, stderr = run_eval(workdir, tasks, f"--tasks={names}")
    assert code == 0, stderr
    accuracy, bits = by_hand(workdir)
    assert stdout.startswith("step 20, S=8, p=0.5\n|")
    assert f"{accuracy:.4f}" in stdout and f"{bits:.4f}" in stdout
    report = json.loads((workdir / "evaluation.json").read_text())
    metrics = {name: task["metrics"] for name, task in report["tasks"].items()}
    assert metrics["own_choice"]["acc,none"] == pytest.approx(accuracy)
    assert metrics["own_text"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)
    # The texts themselves are compared elsewhere; this is the way to the real generator.
    assert report["tasks"]["own_generation"]["examples"] == 3
    assert 0 <= metrics["own_generation"]["exact_match,none"] <= 1


@pytest.mark.slow
def test_eval_py_names_near_tasks(workdir, tasks):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    code, stdout, stderr = run_eval(workdir, tasks, "--tasks=own_text,helaswag")
    assert (code, stdout) == (2, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("error: --tasks: there is no task 'helaswag'; near it: hellaswag")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
