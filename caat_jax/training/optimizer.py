"""AdamW with warm-up, a schedule of the learning rate, clipping, and decay of matrices only."""

from typing import Any

import jax
import optax

from caat_jax.config.sections import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The rate of each update, counted from 0: linear up to the peak, then as `config.schedule`.

    Update `warmup_steps - 1` has the peak rate, update `decay_steps - 1` and later the final one,
    unless the schedule is constant.
    """
    peak, final = config.peak_learning_rate, config.final_learning_rate
    falling = config.decay_steps - config.warmup_steps
    stable = falling - config.cooldown_steps
    after_warmup = {
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=final / peak),
        "linear": optax.linear_schedule(peak, final, falling),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, final, config.cooldown_steps, transition_begin=stable),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    schedule = optax.join_schedules([warmup, after_warmup], [config.warmup_steps])
    # The schedule is 0 at 0: an update that does nothing.
    return lambda update: schedule(update + 1)


def create(config: OptimizerConfig, logical_axes: Any) -> optax.GradientTransformation:
    """The optimizer for parameters with these logical axes."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed(logical_axes),
        ),
    )


def decayed(logical_axes: Any) -> Any:
    """True for matrices; a stack of vectors, one a layer, is no matrix."""
    return jax.tree.map(
        lambda axes: len([name for name in axes if name != "layers"]) > 1,
        logical_axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
