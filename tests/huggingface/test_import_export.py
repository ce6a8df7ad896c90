"""Import and export of Llamas in Hugging Face's format, with folders written by hand."""

import dataclasses
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.checkpoints.trained import tokenizer_of
from caat_jax.config.resolve import resolve
from caat_jax.data.loader import NOTHING_READ
from caat_jax.data.token_cache import open_cache
from caat_jax.errors import InputError
from caat_jax.evaluation import report
from caat_jax.huggingface import safetensors_files
from caat_jax.training import loop
from configs import base
from tests import models, reference
from tests.huggingface.folders_by_hand import (
    ROWS,
    assert_close,
    assert_refused,
    do,
    llama_by_hand,
    our_logits,
    read_file,
    restored,
    run,
    with_targets,
)


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float32", False), ("bfloat16", True), ("float16", False)]
)
def test_llama_by_hand_there_and_back(tmp_path, capsys, dtype, tied):
    source, workdir, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    parameters = llama_by_hand(source, dtype=dtype, tied=tied)
    said = do(capsys, "import", source, workdir, "--tp_shards=4")
    assert dtype in said and "S=4, p=1.0" in said and "CAAT-Net" not in said
    expected = reference.dense_forward(parameters, ROWS, rope_base=100.0, norm_epsilon=1e-5)
    assert_close(our_logits(workdir, M=4)[0], expected)

    do(capsys, "export", workdir, back, f"--dtype={dtype}")
    assert read_file(back / "model.safetensors") == read_file(source / "model.safetensors")
    fields = json.loads((back / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (7, [8, 9])
    assert (fields["dtype"], fields["vocab_size"], fields["rope_theta"]) == (dtype, 64, 100.0)


def test_values_in_several_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safetensors_files, "MAX_FILE_BYTES", 20_000)
    source, workdir, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    llama_by_hand(source)
    do(capsys, "import", source, workdir, "--tp_shards=4")
    do(capsys, "export", workdir, back)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    paths = sorted(back.glob("*.safetensors"))
    assert len(paths) > 2 and not (back / "model.safetensors").exists()
    expected = read_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(len(content) for *_, content in expected.values())
    found = {path.name: read_file(path) for path in paths}
    assert index["weight_map"] == {name: file for file in found for name in found[file]}
    assert {name: tensor for file in found.values() for name, tensor in file.items()} == expected
    # And in again.
    do(capsys, "import", back, tmp_path / "again", "--tp_shards=4")
    do(capsys, "export", tmp_path / "again", tmp_path / "back again")
    again = tmp_path / "back again"
    for path in paths:
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_a_llama_computes_itself_is_no_part_of_the_weights(tmp_path, capsys):
    embedding = llama_by_hand(tmp_path / "first", tied=True)["embedding"]
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
        "model.rotary_emb.inv_freq": np.ones(3, np.float32),
        "lm_head.weight": embedding.astype(np.float32),
    }
    fields = {"hidden_act": "swish"}
    llama_by_hand(tmp_path / "source", tied=True, tensors=extra, config=fields)
    path = tmp_path / "source" / "config.json"
    path.write_text("﻿" + path.read_text())
    do(capsys, "import", tmp_path / "source", tmp_path / "run", "--tp_shards=4")
    do(capsys, "export", tmp_path / "run", tmp_path / "back")
    assert extra.keys().isdisjoint(read_file(tmp_path / "back" / "model.safetensors"))


def test_a_stored_head_goes_before_a_tied_one(tmp_path, capsys):
    other = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
    llama_by_hand(tmp_path / "source", tied=True, tensors={"lm_head.weight": other})
    said = do(capsys, "import", tmp_path / "source", tmp_path / "run", "--tp_shards=4")
    assert "tie_word_embeddings" in said and "--config.model.tied_head" not in said
    do(capsys, "export", tmp_path / "run", tmp_path / "back")
    assert read_file(tmp_path / "back" / "model.safetensors") == read_file(
        tmp_path / "source" / "model.safetensors"
    )
    assert not json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


# ---- Tokenisers, and training on ----------------------------------------------------------------


def write_tokenizer(path):
    """One id a letter, with <s> and </s>: 29 ids."""
    names = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(path))


def test_import_evaluate_train_on_and_export(tmp_path, capsys):
    """With what the import prints."""
    source, workdir, out = tmp_path / "source", tmp_path / "a run", tmp_path / "out"
    llama_by_hand(source)
    write_tokenizer(source / "tokenizer.json")
    (source / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    said = do(capsys, "import", source, workdir, "--tp_shards=4", "--sync_factor=0.25")
    evaluate, train = (shlex.split(line) for line in said.splitlines()[-3:-1])
    assert evaluate == ["python", "eval.py", f"--workdir={workdir}"]
    assert train == ["python", "train.py", f"--config={workdir}/config.py", f"--workdir={workdir}"]
    config = runpy.run_path(str(workdir / "config.py"))["get_config"]()
    assert config.data.tokenizer == f"{workdir}/huggingface/tokenizer.json"
    step, stored = checkpoint.newest_config(workdir)
    assert (step, stored.model.sync_factors) == (0, ((0.25, 0.25),) * 2)
    assert resolve(config) == stored

    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{'abcdefghijkl'[number]} text to train on " * 9)
    config.data.update(files=f"{texts}/*.txt", cache_dir=str(tmp_path / "cache"), holdout_every=2)
    config.data.sequence_length = 16
    config.optimizer.warmup_steps = 0
    config.train.update(steps=2, global_batch=2)
    done, loss = loop.train(resolve(config), workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert done == 2 and json.loads(lines[0])["step"] == 1
    step, stored = checkpoint.newest_config(workdir)
    assert step == 2 and report.evaluate_checkpoint(workdir, step, stored).loss == loss

    do(capsys, "export", workdir, out)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    fields = json.loads((out / "config.json").read_text())
    assert (fields["model_type"], fields["eos_token_id"]) == ("caat_llama", [8, 9])
    assert fields["sync_widths"] == [[8, 8]] * 2 and fields["max_position_embeddings"] == 64
    trained, first = (read_file(f / "model.safetensors") for f in (out, source))
    assert all(trained[name][:2] == first[name][:2] for name in first)
    assert not any(trained[name] == first[name] for name in first if "proj" in name)


def test_step_zero_of_an_import_evaluates(tmp_path, capsys):
    """As in the source: the mean loss of the dense model on the sequences."""
    llama_by_hand(tmp_path / "source")
    write_tokenizer(tmp_path / "source" / "tokenizer.json")
    do(capsys, "import", tmp_path / "source", tmp_path / "run", "--tp_shards=4")
    step, config = checkpoint.newest_config(tmp_path / "run")
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / str(number)).write_text("abcdefghijkl"[number] * 99)
    data = dataclasses.replace(
        config.data,
        files=f"{tmp_path}/texts/*",
        cache_dir=str(tmp_path / "cache"),
        holdout_every=2,
        sequence_length=16,
    )
    config = dataclasses.replace(config, data=data)
    cache = str(tmp_path / "cache")
    loss = report.evaluate_checkpoint(tmp_path / "run", step, config, cache).loss
    sequences = open_cache(data, tokenizer_of(config, tmp_path / "run")).validation
    rows = np.stack([sequences[i] for i in range(len(sequences))])
    ours = our_logits(tmp_path / "run", rows=np.maximum(rows[:, :-1], 0))[0]
    log_total = np.log(np.exp(ours).sum(axis=-1))
    chosen = np.take_along_axis(ours, np.maximum(rows[:, 1:, None], 0), axis=-1)[..., 0]
    assert loss == pytest.approx((log_total - chosen)[rows[:, 1:] >= 0].mean(), rel=1e-5)


def test_no_tokeniser_is_no_reason_to_read_bytes(tmp_path, capsys):
    """The default tokeniser has more ids than this model."""
    llama_by_hand(tmp_path / "source")
    said = do(capsys, "import", tmp_path / "source", tmp_path / "run", "--tp_shards=4")
    assert "no tokenizer.json or tokenizer.model" in said
    with pytest.raises(InputError, match="258 ids, more than"):
        report.evaluate_checkpoint(tmp_path / "run", *checkpoint.newest_config(tmp_path / "run"))


def test_run_of_our_own_takes_its_tokeniser_along(tmp_path, capsys):
    write_tokenizer(tmp_path / "letters.json")
    sizes = dict(model=dict(tp_shards=4, vocab_size=32))
    config = models.small_config(**sizes)
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "letters.json"))
    config = dataclasses.replace(config, data=data)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(models.programs(config).initial_state(), 0, config, NOTHING_READ)
    do(capsys, "export", tmp_path / "run", tmp_path / "out")
    content = (tmp_path / "letters.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    stored = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (stored["bos_token"], stored["eos_token"]) == ("<s>", "</s>")
    (tmp_path / "letters.json").unlink()
    assert_refused(run(capsys, "export", tmp_path / "run", tmp_path / "other"), "letters.json")
    assert not (tmp_path / "other").exists()


# ---- Refusals ---------------------------------------------------------------------------------

NO_TENSOR = dict.fromkeys(["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
BAD_SOURCES = [
    (dict(config={"model_type": "mistral"}), [], ['model_type="mistral"', '"llama"']),
    (dict(config={"model_type": "absent"}), [], ["no model_type", "llama"]),
    (dict(config={"hidden_act": "gelu"}), [], ['hidden_act="gelu"', '"silu"']),
    (dict(config={"attention_bias": True}), [], ["attention_bias=true", "must be false"]),
    (dict(config={"mlp_bias": True}), [], ["mlp_bias=true"]),
    (dict(config={"quantization_config": {"bits": 4}}), [], ["quantization_config"]),
    (dict(config={"hidden_size": "absent"}), [], ["config.json", "hidden_size=null"]),
    (dict(config={"head_dim": 6.5}), [], ["head_dim=6.5", "whole number"]),
    (dict(config={"rms_norm_eps": "small"}), [], ['rms_norm_eps="small"', "number"]),
    (
        dict(config={"rope_scaling": {"type": "linear", "factor": 2.0}}),
        [],
        ["linear", "default, llama3"],
    ),
    (
        dict(config={"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        [],
        ["yarn", "default, llama3"],
    ),
    (dict(config={"rope_scaling": {"rope_type": "llama3"}}), [], ["llama3 needs factor"]),
    (dict(config={"partial_rotary_factor": 0.5}), [], ["partial_rotary_factor=0.5"]),
    (
        {},
        ["--tp_shards=3"],
        ["--tp_shards=3", "kv_heads 4", "vocab_size 64", "allowed: 1, 2, 4, 8"],
    ),
    ({}, ["--tp_shards=0"], ["--tp_shards=0", "allowed: 1, 2, 4, 8"]),
    (dict(config={"vocab_size": 65}), [], ["vocab_size 65", "allowed: 1"]),
    ({}, ["--sync_factor=1.5"], ["sync_factor=1.5", "[0, 1]"]),
    (dict(config={"vocab_size": 60}), [], ["model.embed_tokens.weight", "[64, 32]", "[60, 32]"]),
    (dict(config={"num_hidden_layers": 3}), [], ["model.layers.2.input_layernorm.weight", "miss"]),
    (dict(config={"num_hidden_layers": 1}), [], ["model.layers.1.", "not part of a Llama"]),
    (dict(tensors=NO_TENSOR), [], ["model.layers.1.mlp.up_proj.weight and 1 more are missing"]),
    (dict(tensors={"x.bias": np.ones(3, np.float32)}), [], ["x.bias is", "not part of a Llama"]),
    (dict(tensors={"x": np.ones(3, np.int64)}), [], ["x has type I64", "F32, BF16, F16"]),
]


@pytest.mark.parametrize(
    ("bad", "flags", "said"), BAD_SOURCES, ids=lambda v: str(v)[:50] if v else ""
)
def test_import_refuses(tmp_path, capsys, bad, flags, said):
    llama_by_hand(tmp_path / "source", **bad)
    places = [tmp_path / "source", tmp_path / "run"]
    assert_refused(run(capsys, "import", *places, "--tp_shards=4", *flags), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda source: (source / "config.json").unlink(), ["has no config.json"]),
        (
            lambda source: (source / "config.json").write_text("{"),
            ["config.json is not a JSON obj"],
        ),
        (
            lambda source: (source / "config.json").write_text("[]"),
            ["config.json is not a JSON obj"],
        ),
        (lambda source: (source / "model.safetensors").unlink(), ["has no model.safetensors"]),
        (lambda source: cut(source / "model.safetensors"), ["model.safetensors", "cut off"]),
        (lambda source: (source / "model.safetensors").write_bytes(b"x" * 9), ["cut off"]),
        (
            lambda source: (source / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{]"),
            ["model.safetensors is not a safetensors file"],
        ),
        (
            lambda source: (source / "model.safetensors.index.json").write_text("{}"),
            ["has no weight_map"],
        ),
        (
            lambda source: (source / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "a.safetensors"}}'
            ),
            ["a.safetensors", "No such file"],
        ),
    ],
)
def test_import_refuses_files(tmp_path, capsys, spoil, said):
    llama_by_hand(tmp_path / "source")
    spoil(tmp_path / "source")
    places = [tmp_path / "source", tmp_path / "run"]
    assert_refused(run(capsys, "import", *places, "--tp_shards=4"), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_folders_that_will_not_do(tmp_path, capsys):
    source, full, file = tmp_path / "source", tmp_path / "full", tmp_path / "file"
    llama_by_hand(source)
    full.mkdir()
    (full / "a").touch()
    file.touch()
    for command_ in ("import", "export"):
        for place, said in ((full, "not empty"), (file, "is a file"), (file / "x", "is a file")):
            assert_refused(run(capsys, command_, source, place), said, str(place))
    assert_refused(
        run(capsys, "import", tmp_path / "none", tmp_path / "run"), "none", "has no config.json"
    )
    for workdir in (tmp_path / "none", source):
        assert_refused(run(capsys, "export", workdir, tmp_path / "out"), "no checkpoint")
    assert_refused(run(capsys, "fly"), "fly", "import", "export")
    assert_refused(run(capsys), "import", "export")
    assert_refused(run(capsys, "export", full, file, "--tp_shards=4"), "--tp_shards is not a flag")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "source"]
    assert [path.name for path in full.iterdir()] == ["a"]


def test_export_refuses_a_type(tmp_path, capsys):
    source, workdir, out = tmp_path / "source", tmp_path / "run", tmp_path / "out"
    llama_by_hand(source, tensors={"model.norm.weight": np.full(32, 7e4, np.float32)})
    do(capsys, "import", source, workdir, "--tp_shards=1")
    said = ["--dtype=int8", "float32, bfloat16, float16"]
    assert_refused(run(capsys, "export", workdir, out, "--dtype=int8"), *said)
    said = ["--dtype=float16", "final_norm", "bfloat16"]
    assert_refused(run(capsys, "export", workdir, out, "--dtype=float16"), *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


def test_refused_as_users_see_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "caat_jax.huggingface", "import", tmp_path / "a", tmp_path / "b"],
        cwd=Path(base.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused((done.returncode, done.stdout, done.stderr), "has no config.json")


# ---- Padding ------------------------------------------------------------------------------------


def only(parameters, *, heads, kv_heads, mlp_dim, vocab_size):
    """The parameters of these heads, and of so many of the others."""
    attention, mlp = parameters["layers"]["attention"], parameters["layers"]["mlp"]
    attention = attention | dict(
        query=attention["query"][:, :, heads],
        key=attention["key"][:, :, :kv_heads],
        value=attention["value"][:, :, :kv_heads],
        output=attention["output"][:, heads],
    )
    mlp = mlp | dict(
        gate=mlp["gate"][:, :, :mlp_dim],
        up=mlp["up"][:, :, :mlp_dim],
        down=mlp["down"][:, :mlp_dim],
    )
    found = parameters | {"layers": dict(attention=attention, mlp=mlp)}
    found["embedding"] = found["embedding"][:vocab_size]
    return found | ({"head": found["head"][:, :vocab_size]} if "head" in found else {})


NINE = dict(heads=18, kv_heads=9, mlp_dim=54, vocab_size=72, vocab_padding=8)
SIXTEEN = dict(heads=16, kv_heads=4, mlp_dim=48, vocab_size=64, vocab_padding=0)


@pytest.mark.parametrize(
    ("shards", "sizes", "heads", "M"),
    [
        (9, NINE, range(8), 1),
        (16, SIXTEEN, [0, 1, 4, 5, 8, 9, 12, 13], 8),  # each key/value head has two more
    ],
    ids=["S=9", "S=16"],
)
def test_padded_import_is_the_dense_function(tmp_path, capsys, shards, sizes, heads, M):
    """Logits, loss and every gradient; and the same tensors out again."""
    source, workdir = tmp_path / "source", tmp_path / "run"
    parameters = llama_by_hand(source, tied=shards == 16)
    flags = ["import", source, workdir, f"--tp_shards={shards}"]
    assert_refused(run(capsys, *flags), "--pad")
    assert f"heads 8 → {sizes['heads']}" in do(capsys, *flags, "--pad=true")
    arch = checkpoint.newest_config(workdir)[1].model
    assert {name: getattr(arch, name) for name in sizes} == sizes

    loss, gradients, logits = models.loss_gradients_and_logits(
        *restored(workdir, M), with_targets(ROWS)
    )
    dense = dict(rope_base=100.0, norm_epsilon=1e-5)
    assert_close(logits[..., :64], reference.dense_forward(parameters, ROWS, **dense))
    assert np.isneginf(logits[..., 64:]).all()
    targets = np.concatenate([ROWS[:, 1:], np.full_like(ROWS[:, :1], -1)], axis=1)
    expected_loss, expected = reference.loss_and_gradients(
        parameters, ROWS, targets, tp_shards=1, sync_widths=((32, 32),) * 2, **dense
    )
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    found = only(gradients, heads=list(heads), kv_heads=4, mlp_dim=48, vocab_size=64)
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=1e-5), found, expected)
    if shards == 9:  # nothing else moves
        moved = [np.count_nonzero(a) for a in jax.tree.leaves(gradients)]
        assert moved == [np.count_nonzero(a) for a in jax.tree.leaves(found)]

    do(capsys, "export", workdir, tmp_path / "back")
    back = read_file(tmp_path / "back" / "model.safetensors")
    assert back == read_file(source / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [9, 16], ids=lambda shards: f"S={shards}")
def test_padded_import_trained_on(tmp_path, capsys, shards):
    """Zeros that are zero still are left out of an export; heads that have learnt are kept."""
    source, workdir, out = tmp_path / "source", tmp_path / "run", tmp_path / "trained"
    llama_by_hand(source)
    write_tokenizer(source / "tokenizer.json")
    do(capsys, "import", source, workdir, f"--tp_shards={shards}", "--pad=true")
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / str(number)).write_text("abcdefghijkl"[number] * 99)
    config = runpy.run_path(str(workdir / "config.py"))["get_config"]()
    config.data.update(files=f"{tmp_path}/texts/*", cache_dir=f"{tmp_path}/cache")
    config.data.update(holdout_every=2, sequence_length=16)
    config.optimizer.warmup_steps = 0
    config.train.update(steps=2, global_batch=8)
    loop.train(resolve(config), workdir)

    said = do(capsys, "export", workdir, out)
    assert ("heads 8 → 18" in said) == (shards == 9)
    fields = json.loads((out / "config.json").read_text())
    assert fields["num_attention_heads"] == {9: 8, 16: 16}[shards] and fields["vocab_size"] == 64
    trained, first = (read_file(f / "model.safetensors") for f in (out, source))
    assert not any(trained[name][2] == first[name][2] for name in first)
    do(capsys, "import", out, tmp_path / "again", "--tp_shards=1")
    expected = our_logits(workdir)[0][..., :64]
    assert_close(our_logits(tmp_path / "again")[0], expected, tolerance=1e-5)
