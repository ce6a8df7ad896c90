"""What a training step takes at least, against what the compiled one takes."""

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
    least = memory.least_training_bytes(config, programs.mesh)
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
        memory.check_training(models.small_config(**fields), mesh)
