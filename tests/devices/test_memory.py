"""What a training step takes at least, against what the compiled one takes."""

import dataclasses
import math

import pytest

from caat_jax.devices import memory
from caat_jax.errors import InputError
from tests import models


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, {}),
        ({"tied_head": True}, dict(model=2)),
        ({"vocab_size": 4096}, dict(data=2, fsdp=2)),
        ({"mlp_dim": 4096}, dict(fsdp=2, model=4)),
    ],
    ids=str,
)
def test_a_step_takes_no_less(fields, sizes):
    config = models.small_config(model=fields, mesh=sizes)
    programs = models.programs(config)
    assert memory.parameter_count(config.model) == programs.blueprint.size
    compiled = programs.compile_train_step().memory_analysis()
    taken = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    least = memory.least_training_bytes(config, programs.mesh, "plain")
    assert taken / 4 < least <= taken


@pytest.mark.parametrize(
    "fields",
    [
        dict(model=dict(mlp_dim=10**9)),
        dict(model=dict(vocab_size=10**9)),
        dict(global_batch=10**9),
        dict(global_batch=10**9, accumulation_steps=10**9),
        dict(model={name: 2**30 for name in ("embed_dim", "heads", "kv_heads", "mlp_dim")}),
    ],
    ids=str,
)
def test_more_than_there_is(fields):
    mesh = models.programs(models.small_config()).mesh
    with pytest.raises(InputError, match=r"at least [\d,.]+ GB on each of 1 devices"):
        memory.check_training(models.small_config(**fields), mesh, "plain")


@pytest.mark.parametrize(
    ("gigabytes", "remedy"),
    [
        (12, "parts; try --config.train.accumulation_steps=4"),
        (3, "parts; try --config.train.accumulation_steps=8 --config.compute.remat=True"),
        (1, "a smaller model or shorter sequences"),
    ],
)
def test_what_would_fit_is_named(monkeypatch, gigabytes, remedy):
    """The paper's 130M model; by hand, its scores alone are 12 x 16 x 16 x 1024^2 / 2 float32."""
    config = models.small_config(
        model=dict(layers=12, embed_dim=768, head_dim=48, kv_heads=16, mlp_dim=2048),
        global_batch=16,
    )
    data = dataclasses.replace(config.data, sequence_length=1024)
    config = dataclasses.replace(config, data=data)
    mesh = models.programs(models.small_config()).mesh
    assert memory.least_training_bytes(config, mesh, "plain") > 12 * 16 * 16 * 2**20 / 2 * 4
    monkeypatch.setattr(memory, "_available_bytes", lambda mesh: gigabytes * 1e9)
    with pytest.raises(InputError) as error:
        memory.check_training(config, mesh, "plain")
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "5000", "a/b/memory.max": "max"}, 5000),
        ("0::/outside\n", {"memory.max": "7000"}, 7000),
        ("3:cpu:/\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "6000"}, 6000),
        ("3:cpu:/\n", {"memory.max": "1"}, math.inf),
    ],
)
def test_memory_limits_of_a_container(tmp_path, groups, limits, expected):
    (tmp_path / "groups").write_text(groups)
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(limit + "\n")
    assert memory.container_bytes(tmp_path / "groups", tmp_path) == expected
