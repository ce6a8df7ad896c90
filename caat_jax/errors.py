"""The one error that bad input raises."""


class InputError(ValueError):
    """Something the user gave cannot work.

    The message is one line that names the thing, its value and what is allowed.
    Entry points print it without a traceback and exit with code 2
    (`caat_jax.command_line`).
    """
