"""Bad fields are refused by name, and what is left at -1 is worked out."""

import importlib
import json
import math
from pathlib import Path

import pytest

from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.stored import base_fields, difference, from_json, to_json
from caat_jax.errors import InputError
from caat_jax.sweep import plan as sweep_plan
from configs import base

# All that lie there, those of whoever runs the tests too.
MODULES = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted(Path(base.__file__).parent.glob("[!_]*.py"))
}
SHIPPED = {name: module for name, module in MODULES.items() if "model" in module.get_config()}
NAN, INF = math.nan, math.inf


def resolved(**fields):
    """The resolved base configuration with fields such as `model__heads` replaced."""
    config = base.get_config()
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return resolve(config)


def on_devices(devices, **fields):
    mesh = resolve_mesh(resolved(**fields), devices)
    return mesh.data, mesh.fsdp, mesh.model


# Each line: one bad field (or fields that clash), and what the error must say.
BAD_FIELDS = [
    ({"model__sync_factor": 1.5}, ["model.sync_factor=1.5", "[0, 1]"]),
    ({"model__sync_factor": -0.1}, ["model.sync_factor=-0.1", "[0, 1]"]),
    ({"model__sync_factor": NAN}, ["model.sync_factor=nan", "[0, 1]"]),
    (
        {"model__sync_factor_per_layer": (0.5, 1.0)},
        ["model.sync_factor_per_layer", "2 entries", "model.layers=4"],
    ),
    (
        {"model__sync_factor_per_layer": (1.0, (0.5, 1.0, 0.5), 1.0, 1.0)},
        ["model.sync_factor_per_layer", "(0.5, 1.0, 0.5)", "pair"],
    ),
    (
        {"model__sync_factor_per_layer": (1.0, (0.5,), 1.0, 1.0)},
        ["model.sync_factor_per_layer", "(0.5,)", "pair"],
    ),
    (
        {"model__sync_factor_per_layer": (1.0, "0.5", 1.0, 1.0)},
        ["model.sync_factor_per_layer", "'0.5'", "number"],
    ),
    (
        {"model__sync_factor_per_layer": (1.0, (0.5, 2.0), 1.0, 1.0)},
        ["model.sync_factor_per_layer=2.0", "[0, 1]"],
    ),
    ({"model__layers": None}, ["model.layers=None", "configs/base.py"]),
    ({"train__sync_schedule": None}, ["train.sync_schedule=None", "configs/base.py"]),
    ({"model__heads": 12}, ["model.heads=12", "model.tp_shards=8", "8 or 16"]),
    ({"model__heads": 4}, ["model.heads=4", "model.tp_shards=8", " 8"]),
    (
        {"model__kv_heads": 12},
        ["model.kv_heads=12", "model.tp_shards=8", "8 or 16", "or a divisor"],
    ),
    ({"model__mlp_dim": 770}, ["model.mlp_dim=770", "model.tp_shards=8", "768 or 776"]),
    ({"model__vocab_size": 258}, ["model.vocab_size=258", "256 or 264", "model.vocab_size=-1"]),
    ({"model__vocab_size": 0}, ["model.vocab_size=0", "at least 1"]),
    ({"model__vocab_padding": -1}, ["model.vocab_padding=-1", "at least 0"]),
    ({"model__vocab_size": 8, "model__vocab_padding": 8}, ["model.vocab_padding=8", "at most 7"]),
    ({"model__kv_heads": 16}, ["model.kv_heads=16", "model.heads=8"]),
    ({"model__embed_dim": 260}, ["model.embed_dim=260", "model.heads=8", "256 or 264"]),
    ({"model__embed_dim": 8}, ["model.head_dim=1", "even"]),
    ({"model__head_dim": 31}, ["model.head_dim=31", "even"]),
    ({"model__head_dim": 0}, ["model.head_dim=0", "even"]),
    ({"model__rope_base": 0.0}, ["model.rope_base=0.0", "above 0"]),
    ({"model__rope_base": NAN}, ["model.rope_base=nan", "above 0"]),
    ({"model__rope_scaling_factor": 0.5}, ["model.rope_scaling_factor=0.5", "at least 1"]),
    ({"model__rope_scaling_factor": NAN}, ["model.rope_scaling_factor=nan", "at least 1"]),
    ({"model__rope_scaling_low_turns": 0.0}, ["model.rope_scaling_low_turns=0.0", "above 0"]),
    (
        {"model__rope_scaling_high_turns": 1.0},
        ["model.rope_scaling_high_turns=1.0", "above", "model.rope_scaling_low_turns=1.0"],
    ),
    (
        {"model__rope_scaling_original_length": 0},
        ["model.rope_scaling_original_length=0", "at least 1"],
    ),
    ({"model__norm_epsilon": -1e-5}, ["model.norm_epsilon=-1e-05", "above 0"]),
    *(
        ({f"model__{field}": 0}, [f"model.{field}=0", "at least 1"])
        for field in ("layers", "embed_dim", "heads", "kv_heads", "mlp_dim", "tp_shards")
    ),
    ({"compute__dtype": "float16"}, ["compute.dtype='float16'", "float32, bfloat16"]),
    ({"compute__dtype": ""}, ["compute.dtype=''", "float32, bfloat16"]),
    (
        {"compute__forward_wire_dtype": "float8_e5m2"},
        ["compute.forward_wire_dtype='float8_e5m2'", "float32, bfloat16, int8, float8_e4m3fn"],
    ),
    ({"compute__batch_parts": -1}, ["compute.batch_parts=-1", "at least 0"]),
    ({"compute__wire_block": 0}, ["compute.wire_block=0", "at least 1"]),
    ({"compute__backward_wire_dtype": ""}, ["compute.backward_wire_dtype=''", "bfloat16"]),
    ({"compute__attention": "flash"}, ["compute.attention='flash'", "auto, plain, splash, cudnn"]),
    (
        {"compute__attention": "cudnn"},
        ["compute.attention=cudnn", "compute.dtype=float32", "bfloat16"],
    ),
    *(
        (
            {
                "compute__attention": "cudnn",
                "compute__dtype": "bfloat16",
                "model__head_dim": head_dim,
            },
            ["compute.attention=cudnn", f"model.head_dim={head_dim}", "multiples of 8 up to 128"],
        )
        for head_dim in (36, 136)
    ),
    ({"mesh__model": 3}, ["mesh.model=3", "model.tp_shards=8", "1, 2, 4, 8"]),
    ({"mesh__model": 16}, ["mesh.model=16", "model.tp_shards=8", "1, 2, 4, 8"]),
    ({"mesh__data": 0}, ["mesh.data=0", "at least 1", "-1"]),
    ({"mesh__fsdp": -2}, ["mesh.fsdp=-2", "at least 1", "-1"]),
    ({"mesh__simulated_devices": -1}, ["mesh.simulated_devices=-1", "at least 0"]),
    (
        {"data__tfds_name": "c4/en", "data__files": "*.txt"},
        ["data.tfds_name=c4/en", "data.files=*.txt", "give one"],
    ),
    ({"data__holdout_every": 1}, ["data.holdout_every=1", "at least 2"]),
    ({"data__encoding_errors": "lax"}, ["data.encoding_errors='lax'", "strict, replace, ignore"]),
    ({"data__sequence_length": 0}, ["data.sequence_length=0", "at least 1"]),
    ({"optimizer__peak_learning_rate": 0.0}, ["optimizer.peak_learning_rate=0.0", "above 0"]),
    ({"optimizer__peak_learning_rate": NAN}, ["optimizer.peak_learning_rate=nan", "above 0"]),
    (
        {"optimizer__final_learning_rate": 0.1},
        ["optimizer.final_learning_rate=0.1", "optimizer.peak_learning_rate=0.001"],
    ),
    ({"optimizer__final_learning_rate": NAN}, ["optimizer.final_learning_rate=nan"]),
    ({"optimizer__schedule": "cosin"}, ["optimizer.schedule='cosin'", "cosine, linear, constant"]),
    (
        {"optimizer__schedule": "wsd", "optimizer__cooldown_steps": 91},
        ["optimizer.cooldown_steps=91", "at most 90", "optimizer.warmup_steps"],
    ),
    ({"optimizer__warmup_steps": -2}, ["optimizer.warmup_steps=-2", "at least 0"]),
    (
        {"optimizer__warmup_steps": 100},
        ["optimizer.decay_steps=100", "train.steps", "optimizer.warmup_steps=100"],
    ),
    (
        {"optimizer__decay_steps": 20, "optimizer__warmup_steps": 20},
        ["optimizer.decay_steps=20", "optimizer.warmup_steps=20", "optimizer.warmup_steps=-1"],
    ),
    ({"optimizer__beta1": 1.0}, ["optimizer.beta1=1.0", "[0, 1)"]),
    ({"optimizer__beta2": -0.1}, ["optimizer.beta2=-0.1", "[0, 1)"]),
    ({"optimizer__beta2": NAN}, ["optimizer.beta2=nan", "[0, 1)"]),
    ({"optimizer__epsilon": 0.0}, ["optimizer.epsilon=0.0", "above 0"]),
    ({"optimizer__weight_decay": -0.1}, ["optimizer.weight_decay=-0.1", "at least 0"]),
    ({"optimizer__weight_decay": NAN}, ["optimizer.weight_decay=nan", "at least 0"]),
    ({"optimizer__gradient_clip_norm": 0.0}, ["optimizer.gradient_clip_norm=0.0", "above 0"]),
    *(
        ({f"train__{field}": 0}, [f"train.{field}=0", "at least 1"])
        for field in (
            "steps",
            "global_batch",
            "accumulation_steps",
            "log_every",
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
            "checkpoints_to_keep",
        )
    ),
    ({"train__eval_sequences": -2}, ["train.eval_sequences=-2", "at least 1"]),
    ({"seed": -1}, ["seed=-1", "at least 0"]),
    # What no program of 32-bit numbers holds, or no machine in a lifetime.
    *(
        ({field: 2**31}, [f"{field.replace('__', '.')}=2147483648", "2147483647"])
        for field in ("seed", "model__head_dim", "data__holdout_every", "optimizer__decay_steps")
    ),
    ({"model__layers": 10**9}, ["model.layers=1000000000", "at most 10000"]),
    ({"mesh__simulated_devices": 2000}, ["mesh.simulated_devices=2000", "at most 1024"]),
    ({"model__rope_base": 1e-50}, ["model.rope_base=1e-50", "from 1.2e-38"]),
    ({"model__rope_scaling_factor": INF}, ["model.rope_scaling_factor=inf", "at most 3.4e+38"]),
    ({"optimizer__epsilon": 1e-46}, ["optimizer.epsilon=1e-46", "from 1.2e-38"]),
    ({"optimizer__weight_decay": 1e300}, ["optimizer.weight_decay=1e+300", "at most 3.4e+38"]),
    ({"optimizer__peak_learning_rate": INF}, ["peak_learning_rate=inf", "to 3.4e+38"]),
    ({"optimizer__beta1": 1 - 1e-9}, ["optimizer.beta1=0.999999999", "[0, 1)", "0.9999999"]),
    *(
        ({"train__sync_schedule": stages}, ["train.sync_schedule", *said])
        for stages, said in (
            ((500, 1.0), ["500 must be a pair (last step, factor)", "((500, 1.0),)"]),
            (((500, 1.0, 2),), ["(500, 1.0, 2) must be a pair"]),
            (((2.5, 1.0),), ["(2.5, 1.0)", "whole step"]),
            (((True, 1.0),), ["(True, 1.0)", "whole step"]),
            (("500",), ["'500' must be a pair"]),
            (((-1, 1.0),), ["last step=-1 must be at least 0"]),
            (((2**31, 1.0),), ["last step=2147483648 must be at most 2147483647"]),
            (((5, 1.0), (5, 0.5)), ["last step=5 must be at least 6"]),
            (((5, 1.0), (4, 0.5)), ["last step=4 must be at least 6"]),
            (((5, 1.0), (9, 1.5)), ["(to step 9)=1.5 is outside [0, 1]"]),
            (((5, NAN),), ["(to step 5)=nan is outside [0, 1]"]),
            (((5, None),), ["(to step 5): None must be a number or a pair"]),
            (((5, (1.0, 0.5)),), ["(to step 5) has 2 entries", "model.layers=4"]),
            (((5, ()),), ["(to step 5) has 0 entries", "model.layers=4"]),
            (((5, (1, 1, 1, (0.5,))),), ["(to step 5): (0.5,) must be a number or a pair"]),
        )
    ),
    *(({"train__profile_step": n}, [f"train.profile_step={n}", "at least 1"]) for n in (0, -2)),
]


@pytest.mark.parametrize(("fields", "said"), BAD_FIELDS, ids=lambda value: str(value)[:60])
def test_bad_field_is_refused_in_one_line(fields, said):
    with pytest.raises(InputError) as error:
        resolved(**fields)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("devices", "given", "expected"),
    [
        (1, {}, (1, 1, 1)),
        (2, {}, (1, 1, 2)),
        (8, {}, (1, 1, 8)),
        (16, {}, (2, 1, 8)),
        (12, {"train__global_batch": 6}, (3, 1, 4)),  # 6 and 12 do not divide S = 8
        (7, {"train__global_batch": 14}, (7, 1, 1)),
        (6, {"model__tp_shards": 4, "train__global_batch": 6}, (3, 1, 2)),
        (8, {"mesh__model": 2}, (4, 1, 2)),
        (8, {"mesh__data": 2}, (2, 1, 4)),
        (8, {"mesh__data": 2, "mesh__fsdp": 2}, (2, 2, 2)),
        (8, {"mesh__data": 1, "mesh__fsdp": -1, "mesh__model": 2}, (1, 4, 2)),
        (8, {"mesh__fsdp": -1, "mesh__model": 2}, (4, 1, 2)),  # data before fsdp
        (64, {"mesh__data": 1, "mesh__fsdp": -1}, (1, 8, 8)),
        (8, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}, (2, 2, 2)),
    ],
)
def test_mesh_sizes_are_worked_out(devices, given, expected):
    assert on_devices(devices, **given) == expected


@pytest.mark.parametrize(
    ("devices", "given", "said"),
    [
        (8, {"mesh__data": 3}, ["mesh.data=3", "8 devices"]),
        (8, {"mesh__data": 2, "mesh__model": 2}, ["mesh.fsdp=1", "mesh.model=2", "8 devices"]),
        (4, {"mesh__data": 1, "mesh__model": 8}, ["mesh.model=8", "4 devices"]),
        (16, {"mesh__data": 1}, ["mesh.model=-1", "16 devices"]),
        (
            16,
            {"train__global_batch": 15},
            ["train.global_batch=15", "mesh.data=2", "multiple of 2", "14 or 16"],
        ),
        (
            8,
            {"mesh__data": 2, "mesh__fsdp": 2, "train__accumulation_steps": 3},
            ["train.global_batch=16", "train.accumulation_steps=3", "multiple of 12", "12 or 24"],
        ),
        (
            3,
            {"mesh__fsdp": 3, "train__global_batch": 15},
            ["model.embed_dim=256", "mesh.fsdp=3"],
        ),
    ],
)
def test_mesh_that_does_not_fit_is_refused(devices, given, said):
    with pytest.raises(InputError) as error:
        on_devices(devices, **given)
    assert [part for part in said if part not in str(error.value)] == [], error.value


def test_what_is_left_open_is_worked_out():
    config = resolved(train__steps=70, model__sync_factor=0.3, compute__dtype="bfloat16")
    assert config.model.head_dim == 256 // 8
    optimizer = config.optimizer
    assert (optimizer.decay_steps, optimizer.warmup_steps, optimizer.cooldown_steps) == (70, 7, 14)
    assert config.compute.forward_wire_dtype == "bfloat16"
    assert config.compute.backward_wire_dtype == "float32"
    assert config.model.sync_widths == ((76, 76),) * 4  # int(76.8)


def test_sync_factor_per_layer_replaces_sync_factor():
    config = resolved(
        model__sync_factor_per_layer=(1.0, 0.5, (0.5, 0.0), 0), model__sync_factor=0.1
    )
    assert config.model.sync_widths == ((256, 256), (128, 128), (128, 0), (0, 0))


@pytest.mark.parametrize(
    ("tokenizer_size", "shards", "expected"), [(258, 8, 264), (264, 8, 264), (265, 4, 268)]
)
def test_vocabulary_is_rounded_up_to_the_shards(tokenizer_size, shards, expected):
    config = resolved(model__tp_shards=shards).with_vocabulary(tokenizer_size)
    assert config.model.vocab_size == expected


def test_vocabulary_that_is_given():
    config = resolved(model__vocab_size=264)
    assert config.with_vocabulary(264) == config.with_vocabulary(10) == config
    with pytest.raises(InputError, match=r"265 ids.*model\.vocab_size=264; use .*=272"):
        config.with_vocabulary(265)
    config = resolved(model__vocab_size=264, model__vocab_padding=6)
    assert config.with_vocabulary(258) == config
    with pytest.raises(InputError, match=r"259 ids.*_size=264 - model\.vocab_padding=6; .*=272"):
        config.with_vocabulary(259)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_resolves_and_survives_json(name):
    config = resolve(SHIPPED[name].get_config())
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    resolve_mesh(config, 8)


@pytest.mark.parametrize("name", SHIPPED)
def test_fields_resolve_to_the_configuration_that_has_them(name):
    config = resolve(SHIPPED[name].get_config())
    fields = base.get_config()
    fields.update(base_fields(config))
    assert resolve(fields) == config


@pytest.mark.parametrize("name", sorted(MODULES.keys() - SHIPPED.keys()))
def test_shipped_sweep_resolves(name):
    assert sweep_plan.resolve(MODULES[name].get_config()).runs


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_is_locked(name):
    with pytest.raises((AttributeError, KeyError)):
        SHIPPED[name].get_config().model.width = 1


def test_schedule_is_worked_out_and_survives_json():
    stages = [(5, 1), [7, [1, (0.5, 0), 0.25, 0]]]
    config = resolved(train__sync_schedule=stages, model__sync_factor=0.5)
    mixed = ((1.0, 1.0), (0.5, 0.0), (0.25, 0.25), (0.0, 0.0))
    assert config.train.sync_schedule == ((5, ((1.0, 1.0),) * 4), (7, mixed))
    assert config.model.sync_factors == ((0.5, 0.5),) * 4
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_json_older_than_fields_of_compute_has_the_defaults():
    config = resolved()
    fields = to_json(config)
    for later in ("wire_block", "emulate_wires", "batch_parts"):
        del fields["compute"][later]
    assert from_json(fields) == config


def test_json_older_than_schedules_of_the_rate_has_the_defaults():
    fields = to_json(resolved())
    del fields["optimizer"]["schedule"], fields["optimizer"]["cooldown_steps"]
    del fields["data"]["own_text"]
    assert from_json(fields) == resolved()


def test_json_older_than_the_schedule_has_none():
    fields = to_json(resolved())
    del fields["train"]["sync_schedule"]
    assert from_json(fields) == resolved()


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_json_of_another_version_is_refused(change):
    fields = to_json(resolved())
    if change == "missing":
        del fields["compute"]["remat"]
    else:
        fields["model"]["dropout"] = 0.1
    with pytest.raises(InputError, match="remat" if change == "missing" else "dropout"):
        from_json(fields)


def test_difference_names_the_fields():
    stored, given = resolved(), resolved(model__sync_factor=0.5, model__layers=2)
    differing = difference(stored, given)
    assert differing == [
        "model.layers: stored 4, requested 2",
        "model.sync_factors: stored 1.0, requested 0.5",
    ]


def test_sync_factors_are_described_by_runs_of_layers():
    factors = (1.0, 1.0, (0.5, 0.0), (0.5, 0.5))
    model = resolved(model__sync_factor_per_layer=factors).model
    described = "1.0 in 2 layers, (0.5, 0.0) in 1 layer, 0.5 in 1 layer"
    assert model.describe_sync_factors() == described


# METHOD.md, "The paper's models".
PAPER = {
    "llama_130m": dict(
        size=(12, 768, 16, 16, 2048),
        batch=(1024, 256),
        rates=(6e-4, 6e-5),
        epsilon=1e-8,
        rope_base=10_000,
        steps=500_000,
    ),
    "llama_1b": dict(
        size=(22, 2048, 32, 8, 5632),
        batch=(2048, 1024),
        rates=(4e-4, 4e-5),
        epsilon=1e-5,
        rope_base=500_000,
        steps=937_500,
    ),
    "llama_7b": dict(
        size=(32, 4096, 32, 32, 11008),
        batch=(4096, 1024),
        rates=(3e-4, 3e-5),
        epsilon=1e-8,
        rope_base=10_000,
        steps=500_000,
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_figures_are_the_papers(name):
    config, paper = resolve(SHIPPED[name].get_config()), PAPER[name]
    model, optimizer = config.model, config.optimizer
    assert (
        model.layers,
        model.embed_dim,
        model.heads,
        model.kv_heads,
        model.mlp_dim,
    ) == paper["size"]
    assert (config.data.sequence_length, config.train.global_batch) == paper["batch"]
    rates = (optimizer.peak_learning_rate, optimizer.final_learning_rate)
    assert rates == paper["rates"]
    assert (optimizer.epsilon, model.rope_base) == (paper["epsilon"], paper["rope_base"])
    assert config.train.steps == optimizer.decay_steps == paper["steps"]
    # What all of them share.
    assert (model.tp_shards, model.vocab_size, model.tied_head) == (8, 32_000, False)
    assert set(model.sync_factors) == {(0.5, 0.5)}
    assert (model.norm_epsilon, config.compute.dtype) == (1e-5, "bfloat16")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.gradient_clip_norm, optimizer.warmup_steps) == (1.0, 2000)
