"""EleutherAI's lm-evaluation-harness: this project's models as one of its models, and its tasks.

The only module that needs `lm_eval` (requirements-eval.txt); `eval.py` imports it for `--tasks`.
"""

import contextlib
import dataclasses
import difflib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_table

from caat_jax.checkpoints.trained import restore_model
from caat_jax.config.sections import Config
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError
from caat_jax.evaluation.scoring import Score, Scored, Scorer
from caat_jax.inference.sampling import Sampling
from caat_jax.training.metrics import json_number
from caat_jax.training.step import Programs

# Resamplings of the few metrics whose standard error has no formula.
_BOOTSTRAP_SAMPLES = 1000
_GENERATION_OPTIONS = ("temperature", "top_k", "top_p")
# Values that ask for nothing, of options that there are not.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0}


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """What eval.py's flags ask for; None is the task's own choice, or all examples."""

    names: tuple[str, ...]  # tasks, groups, tags, or patterns of them
    include_path: Path | None  # a folder of more task files
    num_fewshot: int | None
    limit: int | None  # examples of each task
    batch_size: int | None


class Generates(Protocol):
    """What of `Generator` is needed here."""

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> list[list[int]]:
        """The new tokens after each prompt."""


class HarnessModel(LM):
    """A model as the harness sees one: text in, log-likelihoods or text out.

    Every text starts a document, as in training: after BOS, or what an imported model takes.  What
    is longer than `data.sequence_length` is truncated from the left.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, generator: Callable[[], Generates]):
        """Computes nothing yet.

        Args:
          scorer: for log-likelihoods.
          tokenizer: the model's.
          generator: makes what generates; called when tasks want text.
        """
        super().__init__()
        self._scorer, self._tokenizer, self._make_generator = scorer, tokenizer, generator

    def loglikelihood(self, requests: list[Instance]) -> list[Score]:
        """Of each (context, continuation): the continuation's, and whether it is greedy.

        Raises:
          InputError: a continuation is longer than `data.sequence_length`.
        """
        # The harness's rule: white space between the two belongs to the continuation's tokens.
        texts = [request.args[0].rstrip() for request in requests]
        contexts = self._encode(texts)
        wholes = self._encode(["".join(request.args) for request in requests])
        if not self._tokenizer.prefix:  # the first token is predicted too, after BOS
            wholes = [
                whole if text else [self._tokenizer.bos_id, *whole]
                for text, whole in zip(texts, wholes, strict=True)
            ]
        return self._scorer.score(
            [self._continuation(*pair) for pair in zip(contexts, wholes, strict=True)]
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each (text,): the sum over windows in which every token is predicted once."""
        windows, owners = [], []
        texts = self._tokenizer.encode_batch([request.args[0] for request in requests])
        for owner, ids in enumerate(texts):
            for inputs, predicted in get_rolling_token_windows(
                ids.tolist(), self._tokenizer.bos_id, self._scorer.sequence_length, context_len=1
            ):
                windows.append(Scored([*inputs, predicted[-1]], len(predicted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(windows), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (context, options): the text that follows, up to a stop string or EOS.

        Raises:
          InputError: a task asks for an option that there is not.
        """
        prompts = self._encode([request.args[0] for request in requests])
        options = [_generation_options(request.args[1]) for request in requests]
        stops = [given.pop("until") for given in options]
        # Together goes what has the same options; of that, prompts of similar lengths.
        order = sorted(
            range(len(requests)), key=lambda n: (sorted(options[n].items()), len(prompts[n]))
        )
        generator, texts = self._make_generator(), {}
        for seed, numbers in enumerate(_chunks(order, options, self._scorer.rows)):
            given = dict(options[numbers[0]])
            longest = self._scorer.sequence_length
            new = min(given.pop("max_gen_toks"), longest - 1)  # one token of the context stays
            generated = generator.generate(
                [prompts[n][new - longest :] for n in numbers],
                max_new_tokens=new,
                sampling=Sampling(**given, seed=seed),
                stop_ids=self._tokenizer.roles.stop_ids,
            )
            for n, ids in zip(numbers, generated, strict=True):
                texts[n] = _before_stop(self._tokenizer.decode(ids), stops[n])
        return [texts[n] for n in range(len(requests))]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        tokenizer = self._tokenizer
        # A text without any token, of a tokeniser that puts nothing before it, needs one.
        return [
            [*tokenizer.prefix, *ids.tolist()] or [tokenizer.bos_id]
            for ids in tokenizer.encode_batch(texts)
        ]

    def _continuation(self, context: list[int], whole: list[int]) -> Scored:
        # A tokeniser may join a short continuation to the context's last token.
        targets = min(max(len(whole) - len(context), 1), len(whole) - 1)
        longest = self._scorer.sequence_length
        if targets > longest:
            raise InputError(
                f"--tasks: a continuation of {targets} tokens is longer than the model's"
                f" data.sequence_length={longest}"
            )
        return Scored(whole[-(longest + 1) :], targets)


def evaluate_tasks(
    workdir: Path, step: int, config: Config, options: TaskOptions
) -> tuple[dict[str, Any], str]:
    """Runs tasks on one checkpoint, on this machine's devices, whatever it trained on.

    Returns:
      The figures of each task and group, JSON-able, and the harness's own table of them.

    Raises:
      InputError: there is no such task, or it cannot be loaded.
    """
    manager = _task_manager(options)
    tasks = _load_tasks(manager, options.names, config.data.sequence_length)
    model = restore_model(workdir, step, config)
    rows = options.batch_size or config.train.global_batch // config.train.accumulation_steps

    def generator() -> Generates:
        from caat_jax.inference import generator as decoding

        return decoding.Generator(model.config, model.mesh, model.parameters, model.tokenizer.size)

    scorer = Scorer(Programs(model.config, model.mesh), model.parameters, rows)
    harness_model = HarnessModel(scorer, model.tokenizer, generator)
    results = _run(harness_model, manager, tasks, options)
    columns = ["results"] + ["groups"] * ("groups" in results)
    return _figures(results, config.data.sequence_length), "\n".join(
        make_table(results, c) for c in columns
    )


def _task_manager(options: TaskOptions) -> TaskManager:
    folder = options.include_path
    if folder and not folder.is_dir():
        raise InputError(f"--include_path={folder} is no folder; give one with task YAML files")
    return TaskManager(include_path=folder)


def _load_tasks(manager: TaskManager, names: Sequence[str], longest: int) -> list[Any]:
    """The harness's tasks and groups, their data sets loaded, for a context of `longest` tokens."""
    loaded: list[Any] = []
    matches: dict[str, None] = {}  # in order, each once
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise InputError(
                f"--tasks: there is no task {name!r}{hint} (--include_path=DIR adds task files)"
            )
        matches.update(dict.fromkeys(found))
    for match in matches:
        built = _load(manager, match, match)
        _check_runnable(match, built["tasks"], longest)
        # A tag is as many tasks.
        group = built["groups"].get(match)
        loaded += [group] if group else built["tasks"].values()
    _load(manager, loaded, ",".join(matches))  # refuses a task that is there twice
    return loaded


def _load(manager: TaskManager, what: Any, name: str) -> Any:
    try:
        return manager.load(what)
    # A task is a program: anything may come out of it, and out of a download.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"--tasks: {name} cannot be loaded ({reason})") from error


def _check_runnable(name: str, tasks: dict[str, Any], longest: int) -> None:
    for task in tasks.values():
        for attribute, what in (
            ("UNSAFE_CODE", "runs programs that the model writes"),
            ("MULTIMODAL", "shows the model more than text"),
        ):
            if getattr(task, attribute, False):
                raise InputError(f"--tasks: {name} {what}, which is not supported")
        if task.OUTPUT_TYPE == "generate_until":
            new = _generation_options(dict(task.config.generation_kwargs or {}))["max_gen_toks"]
            if new >= longest:
                raise InputError(
                    f"--tasks: {name} generates max_gen_toks={new} tokens, which leaves none of"
                    f" data.sequence_length={longest} for its prompts; give the task fewer, or the"
                    " model a larger --config.data.sequence_length"
                )


def _run(
    model: HarnessModel, manager: TaskManager, tasks: list[Any], options: TaskOptions
) -> dict[str, Any]:
    # The harness would resample in forked processes; a fork of a process with JAX's threads may
    # hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    # It also prints to stdout, which belongs to the results.
    with contextlib.redirect_stdout(sys.stderr):
        return lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            log_samples=False,
        )


def _figures(results: dict[str, Any], sequence_length: int) -> dict[str, Any]:
    figures = {}
    for name, row in {**results["results"], **results.get("groups", {})}.items():
        figures[name] = {
            "lm_eval": lm_eval.__version__,
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "examples": results["n-samples"].get(name, {}).get("effective"),  # none of a group
            "sequence_length": sequence_length,
            # Named "acc,none": the metric, and the filter that the answers went through.
            "metrics": {key: _jsonable(value) for key, value in row.items() if "," in key},
        }
    return figures


def _jsonable(value: Any) -> Any:
    """A number, or the harness's "N/A"."""
    return value if isinstance(value, str) else json_number(float(value))


def _generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """`until`, `max_gen_toks`, and the fields of `Sampling` of the same names."""
    options = normalize_gen_kwargs(given)
    del options["do_sample"]  # without it, the temperature is 0
    options = {
        name: value
        for name, value in options.items()
        if value is not None and _NEUTRAL.get(name) != value
    }
    known = {"until", "max_gen_toks", *_GENERATION_OPTIONS}
    if unknown := sorted(set(options) - known):
        raise InputError(
            f"--tasks: a task asks for the generation option {unknown[0]}; there are do_sample,"
            f" {', '.join(sorted(known))}"
        )
    return {
        "until": [stop for stop in options["until"] if stop],
        "max_gen_toks": options["max_gen_toks"],
        "temperature": float(options.get("temperature", 0.0)),
        "top_k": int(options.get("top_k", 0)),
        "top_p": float(options.get("top_p", 1.0)),
    }


def _chunks(order: list[int], options: list[dict], rows: int) -> Iterator[list[int]]:
    """`order` cut into at most `rows` requests of the same options."""
    for _, same in itertools.groupby(order, key=lambda n: options[n]):
        numbers = list(same)
        for first in range(0, len(numbers), rows):
            yield numbers[first : first + rows]


def _before_stop(text: str, stops: list[str]) -> str:
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
