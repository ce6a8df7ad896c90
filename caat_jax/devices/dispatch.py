"""Where programs must run one at a time: on simulated devices and on CPU processes."""

from typing import Any

import jax


def one_program_at_a_time() -> bool:
    """Whether this process must wait for each program before it starts the next.

    On several CPU devices, of one process or of several, two programs with collectives in flight
    can wait for each other for ever: simulated devices share few threads, and processes may not
    start the two in the same order.  Accelerators run programs in the order of dispatch, so there
    nothing needs to wait.
    """
    return jax.default_backend() == "cpu" and jax.device_count() > 1


def wait_if_simulated(outputs: Any) -> Any:
    """Waits for a program's outputs where `one_program_at_a_time`; returns them."""
    return jax.block_until_ready(outputs) if one_program_at_a_time() else outputs
