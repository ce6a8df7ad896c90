"""What the entry points share: flags, the configuration, and errors as one line."""

import difflib
import logging
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from caat_jax import command_help
from caat_jax.config.resolve import check_field_names, leaves, resolve
from caat_jax.config.sections import MeshConfig
from caat_jax.devices import processes
from caat_jax.errors import InputError, Interrupted, Stop, about_file
from caat_jax.storage import mirrors
from configs import base

# One of them is there where an NVIDIA GPU is: on Linux, and on Windows' Linux.
_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")

# By how Python begins to say that a text is none.
_WANTED = {
    "invalid literal for int": "must be a whole number",
    "could not convert string to float": "must be a number",
    "Non-boolean argument to boolean flag": "must be true or false",
    "Error while parsing string": 'must be a tuple, such as "(1.0, 0.5)"',
}


def config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE` and, for every field, `--config.section.field=VALUE`."""
    return config_flags.DEFINE_config_file(
        "config", help_string="A Python file with get_config(), such as configs/tiny.py."
    )


def overrides_flag() -> flags.FlagHolder:
    """Defines `--config.data.field=VALUE`, for what is read with a checkpoint's configuration.

    A name that is no field ends the program here: the definition already needs the fields' types.
    """
    _or_exit(lambda: check_field_names(_given_fields(sys.argv), base.get_config()))
    return config_flags.DEFINE_config_dict(
        "config", base.get_config(), help_string="See the fields below: instead of the run's own."
    )


def data_overrides(_: ConfigDict) -> dict[str, Any]:
    """The fields of `config.data` that the flags of `overrides_flag` give, and their values.

    Raises:
      InputError: another field is given.
    """
    given = config_flags.get_override_values(flags.FLAGS["config"])
    for name in given:
        if not name.startswith("data."):
            raise InputError(
                f"--config.{name}: the checkpoint has its own; only config.data can be overridden"
            )
    return {name.removeprefix("data."): value for name, value in given.items()}


def run(
    main: Callable[..., None],
    config: flags.FlagHolder | None = None,
    resolve: Callable[[ConfigDict], object] = resolve,
    fields: Callable[[], ConfigDict] = base.get_config,
    positionals: bool = False,
) -> None:
    """Parses the flags and calls `main(resolve(config))`, or `main()` for one without a config.

    A `Stop`, such as an `InputError` in the flags, becomes one line and its exit code.

    Args:
      main: the program.
      config: of `config_flag` or `overrides_flag`.
      resolve: checks what the flags made of the file, and makes of it what `main` takes.
      fields: a configuration with every field that a file may have.
      positionals: whether `main` takes the arguments that are not flags, as one list at the end;
        otherwise there must be none.
    """

    def parse(argv: list[str]) -> list[str]:
        return _or_exit(lambda: _parse(argv, config, fields, positionals))

    def call(argv: list[str]) -> None:
        rest = [argv[1:]] if positionals else []

        def program() -> None:
            with mirrors.pushed():
                main(*([] if config is None else [resolve(config.value)]), *rest)

        with processes.exit_when_peer_lost():
            _or_exit(program)

    quieten_logs()
    sys.unraisablehook = _print_unraisable
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # not `interrupts.end_at_once`
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    app.run(call, flags_parser=parse)


def quieten_logs() -> None:
    """Orbax and others log every step they take, and also the errors that they raise.

    JAX logs a traceback where its plugin for NVIDIA GPUs is installed and no such GPU is there.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("jax").setLevel(logging.WARNING)
    if not any(Path(device).exists() for device in _NVIDIA_DEVICES):
        logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: not record.exc_info)


def _print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """`sys.unraisablehook` for all but one error: TensorStore has it for every array of a
    checkpoint whose first failed write, raised elsewhere, has ended the loop that awaits them."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def simulate_devices(mesh: MeshConfig) -> None:
    """Starts `mesh.simulated_devices` CPU devices; other platforms are left as they are.

    To be called before anything asks JAX for its devices.
    """
    if mesh.simulated_devices:
        jax.config.update("jax_num_cpu_devices", mesh.simulated_devices)


def _parse(
    argv: list[str],
    config: flags.FlagHolder | None,
    fields: Callable[[], ConfigDict],
    positionals: bool,
) -> list[str]:
    if any(re.match(command_help.ARGUMENTS, argument) for argument in argv[1:]):
        _print_help(argv[0], None if config is None else _fields_of_flags(fields))
    if config is not None:
        check_field_names(_given_fields(argv), fields())
        files = [argument for argument in argv[1:] if re.match(r"--?config(=.*)?$", argument)]
        if flags.FLAGS["config"].default is None and not files:
            example = "sweep" if "grid" in fields() else "tiny"
            raise InputError(
                f"--config is missing; give a file, such as --config=configs/{example}.py"
            )
        if len(files) > 1:
            raise InputError(f"{' and '.join(files)} are both given; give one")
    try:
        rest = flags.FLAGS(argv)
        if config is not None:
            _ = list(config.value)  # a file that is missing fails at its first use
    except flags.UnrecognizedFlagError as error:
        raise InputError(_unknown(error.flagname, config, fields)) from None
    except flags.Error as error:
        raise InputError(_flag_error(str(error))) from None
    # The file is a program: anything may come out of it.
    except Exception as error:
        reason = f"{type(error).__name__}: {_last_line(error)}"
        raise InputError(f"--config cannot be used: {reason}") from None
    if len(rest) > 1 and not positionals:
        raise InputError(f"{rest[1]!r} is not a flag; flags start with --")
    return rest


def _fields_of_flags(fields: Callable[[], ConfigDict]) -> ConfigDict:
    """Those that may be given: where no file is (`overrides_flag`), the data's."""
    is_file = flags.FLAGS["config"].default is None
    return fields() if is_file else ConfigDict({"data": fields().data})


def _print_help(script: str, config: ConfigDict | None) -> NoReturn:
    description = sys.modules["__main__"].__doc__ or ""
    print(command_help.help_text(description, {script, "__main__"}, config))
    sys.exit(0)


def _unknown(flag: str, config: flags.FlagHolder | None, fields: Callable[[], ConfigDict]) -> str:
    """What to say of a flag that there is none of."""
    known = list(flags.FLAGS)
    if config is not None:
        known += [f"config.{name}" for name, _ in leaves(fields())]
    nearest = difflib.get_close_matches(flag, known, n=1)
    return f"--{flag} is not a flag; " + (
        f"the nearest is --{nearest[0]}" if nearest else "--help lists them all"
    )


def _flag_error(message: str) -> str:
    """What absl says of a flag's value, in this project's words where it has better ones."""
    missing = re.findall(r"Flag --(\w+) must have a value other than None", message)
    if missing:
        return " ".join(
            f"--{name} is missing; give --{name}={name.upper()}: {flags.FLAGS[name].help}"
            for name in missing
        )
    message = message.removeprefix("flag ")
    for reason, wanted in _WANTED.items():
        message = re.sub(rf": \W*{reason}.*", f" {wanted}", message, flags=re.DOTALL)
    return message


def _given_fields(argv: list[str]) -> list[str]:
    matches = [re.match(r"--?config\.([\w.]+)", argument) for argument in argv]
    return [match[1] for match in matches if match]


def _or_exit(function: Callable[[], object]) -> object:
    try:
        return function()
    except Stop as stop:
        _end(stop)
    except OSError as error:  # a disk that is full, a folder that is not to be read
        _end(InputError(_flag_of(error.filename) + about_file(error)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = _first_line(error).removeprefix("RESOURCE_EXHAUSTED: ")
        _end(
            InputError(
                f"it does not fit into a device's memory: {reason} Fewer or shorter sequences at"
                " a time take less, and so do larger mesh.model and mesh.fsdp; in training also"
                " compute.remat=True and more train.accumulation_steps"
            ),
            # The others wait for this one in the middle of a step.
            at_once=processes.number() > 1,
        )
    except KeyboardInterrupt:
        _end(Interrupted("stopped; the same command starts again"))


def _flag_of(file: str | None) -> str:
    """`--NAME=VALUE: ` of the flag that gave a file or a folder above it; empty: none did."""
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, str) and value and file:
            path = Path(value).expanduser().absolute()
            if Path(file).absolute().is_relative_to(path) and path != Path("/"):
                return f"--{name}={value}: "
    return ""


def _end(stop: Stop, at_once: bool = False) -> None:
    kind = "" if isinstance(stop, Interrupted) else "error: "
    # One line, also where a value that it names has several.
    line = kind + " ".join(str(stop).splitlines())
    print(mirrors.with_urls(line), file=sys.stderr, flush=True)
    if at_once:
        processes.exit_now(stop.exit_code)
    processes.announce(stop)
    sys.exit(stop.exit_code)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
