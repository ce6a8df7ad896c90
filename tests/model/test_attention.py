"""The attention kernels against the plain one, and which of them a platform gets.

No TPU and no GPU is needed: the TPU's kernel is interpreted, and cuDNN's is replaced by what JAX
itself says computes the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from caat_jax.config.sections import MeshConfig
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.model import attention
from tests import models

# Of a tensor's largest magnitude; in bfloat16 the kernel rounds the scaled query once more.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
SPEC = P("model", ("data", "fsdp"))

interpreted_splash = functools.partial(attention.splash, interpret=True)


def attended_and_gradients(attend, query, key, value, weights):
    """The outputs, and the gradients of their sum times `weights`, on 2 x 2 x 2 devices."""
    sizes = MeshConfig(data=2, fsdp=2, model=2, simulated_devices=0)

    @functools.partial(
        jax.shard_map,
        mesh=sharding.create_mesh(sizes, jax.devices()[:8]),
        in_specs=SPEC,
        out_specs=SPEC,
    )
    def both(query, key, value, weights):
        attended, pullback = jax.vjp(attend, query, key, value)
        return attended, *pullback(weights)

    results = jax.jit(both)(query, key, value, weights)
    return [np.asarray(x, np.float32) for x in results]


def check(attend, *, G, T, H, K, h, dtype):
    """Compares with `plain`; every device has its own values."""
    random = np.random.default_rng(0)
    arrays = [
        jnp.asarray(random.normal(size=(2 * G, 4, T, heads, h)), dtype) for heads in (H, K, K, H)
    ]
    expected = attended_and_gradients(attention.plain, *arrays)
    actual = attended_and_gradients(attend, *arrays)
    names = ("attended", "query", "key", "value")
    errors = {
        n: models.relative_error(a, e) for n, a, e in zip(names, actual, expected, strict=True)
    }
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("G", "T", "H", "K", "h"),
    [
        (1, 128, 2, 2, 48),  # the paper's 130M model
        (1, 256, 4, 1, 64),  # 1.1B: queries grouped in fours
        (1, 640, 2, 2, 128),  # 7B; two blocks of positions, padded to 768
        (2, 10, 4, 2, 4),
    ],
)
def test_splash_is_the_plain_attention(G, T, H, K, h, dtype):
    check(interpreted_splash, G=G, T=T, H=H, K=K, h=h, dtype=dtype)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, (128, 128)),
        (128, (128, 128)),
        (129, (256, 256)),
        (512, (512, 512)),
        (513, (384, 768)),
        (1024, (512, 1024)),
        (1100, (384, 1152)),
        (4096, (512, 4096)),
    ],
)
def test_splash_blocks(length, expected):
    assert attention.splash_blocks(length) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cudnn_call_is_the_plain_attention(monkeypatch, dtype):
    """All but `implementation`: the order of the axes, the mask, the scale, groups as batch."""
    call = jax.nn.dot_product_attention

    def without_cudnn(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return call(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    check(attention.cudnn, G=2, T=10, H=4, K=2, h=8, dtype=dtype)


@pytest.mark.parametrize(
    ("kernel", "platform", "dtype", "head_dim", "expected"),
    [
        ("auto", "tpu", "float32", 4, "splash"),
        ("auto", "tpu", "bfloat16", 48, "splash"),
        ("auto", "gpu", "bfloat16", 64, "cudnn"),
        ("auto", "gpu", "float32", 64, "plain"),
        ("auto", "gpu", "bfloat16", 4, "plain"),
        ("auto", "gpu", "bfloat16", 136, "plain"),
        ("auto", "cpu", "bfloat16", 64, "plain"),
        ("plain", "tpu", "bfloat16", 64, "plain"),
        ("plain", "gpu", "bfloat16", 64, "plain"),
        ("splash", "cpu", "float32", 4, "splash"),
        ("cudnn", "gpu", "bfloat16", 64, "cudnn"),
    ],
)
def test_choice(kernel, platform, dtype, head_dim, expected):
    config = models.small_config(
        model=dict(head_dim=head_dim), compute=dict(attention=kernel, dtype=dtype)
    )
    assert attention.choose(config.model, config.compute, platform) == expected


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cudnn_is_refused_off_gpus(platform):
    config = models.small_config(
        model=dict(head_dim=64), compute=dict(attention="cudnn", dtype="bfloat16")
    )
    with pytest.raises(InputError, match=f"compute.attention=cudnn.*'{platform}'"):
        attention.choose(config.model, config.compute, platform)


def test_kernel_of_each_platform():
    """Only TPUs run the splash kernel as it is."""
    assert attention.kernel("plain", "tpu") is attention.plain
    assert attention.kernel("cudnn", "gpu") is attention.cudnn
    for platform, interpret in (("tpu", False), ("cpu", True), ("gpu", True)):
        assert attention.kernel("splash", platform).keywords == {"interpret": interpret}


@pytest.mark.parametrize(("given", "chosen"), [("auto", "plain"), ("splash", "splash")])
def test_programs_choose_for_their_mesh(given, chosen):
    """The simulated devices are CPUs; `test_partial_sync.py` has the whole model with splash."""
    programs = models.programs(models.small_config(compute=dict(attention=given)))
    assert programs.blueprint.attention == chosen
