"""Checks of single fields: what a number or a word may be; each raises `InputError` in one line."""

import math

from caat_jax.errors import InputError

# Programs count in int32 and compute in float32: beyond these, numbers would be infinite, 0 or 1.
LARGEST_INTEGER = 2**31 - 1
SMALLEST_FLOAT, LARGEST_FLOAT = 1.2e-38, 3.4e38
LARGEST_BELOW_ONE = 1 - 2**-24


def at_least(name: str, value: int, smallest: int, largest: int = LARGEST_INTEGER) -> None:
    if value < smallest:
        raise InputError(f"{name}={value} must be at least {smallest}")
    if value > largest:
        raise InputError(f"{name}={value} must be at most {largest}")


def within(name: str, value: float, smallest: float) -> None:
    # `not <=` rather than `>`: it also refuses nan.
    if not smallest <= value <= LARGEST_FLOAT:
        raise InputError(f"{name}={value} must be at least {smallest}, at most {LARGEST_FLOAT}")


def above_zero(name: str, value: float) -> None:
    if not SMALLEST_FLOAT <= value <= LARGEST_FLOAT:
        raise InputError(
            f"{name}={value} must be above 0: from {SMALLEST_FLOAT} to {LARGEST_FLOAT}"
        )


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r} must be one of {', '.join(allowed)}")


def nearest_multiples(value: int, divisor: int) -> str:
    below, above = value // divisor * divisor, math.ceil(value / divisor) * divisor
    return f"{below} or {above}" if below else str(above)
