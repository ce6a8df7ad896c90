"""The learning rate against its closed form, an update against a float64 AdamW."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from caat_jax.config.resolve import resolve
from caat_jax.model.transformer import Blueprint
from caat_jax.training import optimizer
from configs import base

CONFIG = resolve(base.get_config()).optimizer


def closed_form(config, update):
    """Update 0 already moves: linear up to the peak, then down to the final rate."""
    done, warmup = update + 1, config.warmup_steps
    if done <= warmup:
        return config.peak_learning_rate * done / warmup
    if config.schedule == "constant":
        return config.peak_learning_rate
    if config.schedule == "wsd":
        warmup = config.decay_steps - config.cooldown_steps
    gone = min(1, max(0, done - warmup) / (config.decay_steps - warmup))
    if config.schedule == "cosine":
        gone = (1 - math.cos(math.pi * gone)) / 2
    return (1 - gone) * config.peak_learning_rate + gone * config.final_learning_rate


# One rounding of the largest rate: a small one is a difference of large ones.
ROUNDING = CONFIG.peak_learning_rate * 2**-24


@pytest.mark.parametrize(("warmup", "decay"), [(0, 50), (1, 50), (20, 100), (2000, 500_000)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_learning_rate_is_the_closed_form(schedule, warmup, decay):
    steps = dict(warmup_steps=warmup, decay_steps=decay, cooldown_steps=decay // 5)
    config = dataclasses.replace(CONFIG, schedule=schedule, **steps)
    updates = sorted({0, 1, warmup, *range(0, decay + 5, decay // 25), decay - 1, decay, 2 * decay})
    rates = jax.jit(jax.vmap(optimizer.learning_rate(config)))(np.array(updates))
    np.testing.assert_allclose(
        rates, [closed_form(config, u) for u in updates], rtol=2e-5, atol=ROUNDING
    )


def test_learning_rate_at_its_corners():
    config = dataclasses.replace(CONFIG, warmup_steps=20, decay_steps=100)
    peak, final = config.peak_learning_rate, config.final_learning_rate
    rate = optimizer.learning_rate(config)
    at = {0: peak / 20, 19: peak, 99: final, 100: final, 10_000: final}
    for update, expected in at.items():
        assert float(rate(update)) == pytest.approx(expected, rel=1e-6), update


def numpy_adamw(config, parameters, gradients_by_step, decayed):
    """Clipping by the global norm, then AdamW with bias correction, float64, leaf by leaf."""
    parameters = {name: value.astype(np.float64) for name, value in parameters.items()}
    first = {name: np.zeros_like(value) for name, value in parameters.items()}
    second = {name: np.zeros_like(value) for name, value in parameters.items()}
    for update, gradients in enumerate(gradients_by_step):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        clip = min(1.0, config.gradient_clip_norm / norm)
        for name, gradient in gradients.items():
            gradient = clip * gradient.astype(np.float64)
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient**2
            mean = first[name] / (1 - config.beta1 ** (update + 1))
            variance = second[name] / (1 - config.beta2 ** (update + 1))
            direction = mean / (np.sqrt(variance) + config.epsilon)
            if name in decayed:
                direction = direction + config.weight_decay * parameters[name]
            parameters[name] = parameters[name] - closed_form(config, update) * direction
    return parameters


def test_updates_are_adamws():
    """Some gradients above and some below the clipping norm; vectors, stacked or not, no decay."""
    shapes = {"matrix": (4, 3), "stacked_norm": (2, 5), "norm": (5,), "stack": (2, 3, 4)}
    axes = {
        "matrix": ("vocab", "embed"),
        "stacked_norm": ("layers", "norm"),
        "norm": ("norm",),
        "stack": ("layers", "embed", "mlp"),
    }
    config = dataclasses.replace(
        CONFIG, peak_learning_rate=0.1, final_learning_rate=0.01, warmup_steps=3, decay_steps=8
    )
    random = np.random.default_rng(0)

    def draw(scale):
        return {n: scale * random.normal(size=s).astype(np.float32) for n, s in shapes.items()}

    parameters = draw(1.0)
    gradients_by_step = [draw(scale) for scale in (0.01, 3.0, 0.1, 1.0, 0.001, 0.3, 10.0, 0.03)]
    norms = [
        math.sqrt(sum(np.vdot(g, g) for g in gradients.values())) for gradients in gradients_by_step
    ]
    assert min(norms) < config.gradient_clip_norm < max(norms)

    adamw = optimizer.create(config, axes)
    state, current = adamw.init(parameters), parameters
    for gradients in gradients_by_step:
        updates, state = jax.jit(adamw.update)(gradients, state, current)
        current = optax.apply_updates(current, updates)

    expected = numpy_adamw(config, parameters, gradients_by_step, decayed={"matrix", "stack"})
    for name, value in expected.items():
        np.testing.assert_allclose(current[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("tied_head", [False, True])
def test_norms_alone_are_not_decayed(tied_head):
    given = base.get_config()
    given.model.tied_head = tied_head
    config = resolve(given).with_vocabulary(258)
    decayed = optimizer.decayed(Blueprint(config.model, config.compute, "cpu").logical_axes)
    flat, _ = jax.tree_util.tree_flatten_with_path(decayed)
    assert len(flat) == (11 if tied_head else 12)
    for path, is_decayed in flat:
        name = jax.tree_util.keystr(path)
        assert is_decayed == ("norm" not in name), name
