"""What ends a program: one line for people, and an exit code for schedulers.

Entry points print the message without a traceback (`caat_jax.command_line`).
"""


class Stop(Exception):
    """Ends the program with the message, one line, and `exit_code`."""

    exit_code: int


class InputError(Stop, ValueError):
    """Something the user gave cannot work; starting again would fail again.

    The message names the thing, its value and what is allowed.
    """

    exit_code = 2


class Diverged(Stop):
    """The loss or its gradient was not finite too often; starting again would diverge again."""

    exit_code = 3


class Interrupted(Stop):
    """The run was asked to stop, or lost a process; started again, it resumes.

    The exit code is EX_TEMPFAIL of BSD's sysexits.h.
    """

    exit_code = 75


def about_file(error: OSError) -> str:
    """The file and what is wrong with it, such as "runs/a: No space left on device"."""
    return f"{error.filename or 'a file'}: {error.strerror or error}"
