"""What --help prints: the command's own text, whose examples come first, its flags, the fields."""

import shutil
import textwrap
from collections.abc import Iterable

from absl import flags
from ml_collections import ConfigDict

from caat_jax.config.field_comments import field_comments
from caat_jax.config.resolve import leaves

ARGUMENTS = r"--?(h|\?|help|helpshort|helpfull)(=true)?$"
_WIDEST = 100


def help_text(description: str, scripts: Iterable[str], config: ConfigDict | None) -> str:
    """All of it.

    Args:
      description: the docstring of the command's module.
      scripts: names under which absl may know that module.
      config: the fields that `--config.FIELD=VALUE` can give, with their defaults, if any.
    """
    parts = [description.strip(), "Flags:\n" + "\n".join(_flag_entries(scripts))]
    if config is not None:
        parts.append("Fields, as --config.FIELD=VALUE:\n" + "\n".join(_field_entries(config)))
    return "\n\n".join(parts)


def _flag_entries(scripts: Iterable[str]) -> Iterable[str]:
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module in scripts or module.split(".")[0] in ("caat_jax", "benchmarks"):
            for flag in found:
                name = flag.name if flag.boolean else f"{flag.name}={flag.name.upper()}"
                text, _, _ = flag.help.partition(";\n")  # of a flag that may be repeated
                if isinstance(flag.default, float | int | str | list) and flag.default:
                    text += f" Default: {flag.default}."
                yield _entry(f"--{name}", text)


def _field_entries(config: ConfigDict) -> Iterable[str]:
    comments = field_comments()
    order = {name: place for place, name in enumerate(comments)}
    rows = [(name.removeprefix("run."), name, default) for name, default in leaves(config)]
    for field, name, default in sorted(rows, key=lambda row: order.get(row[0], len(order))):
        if not name.startswith("grid."):  # the same again, each with a tuple of values
            yield _entry(f"{name}={default}", comments.get(field, ""))


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        f"{name}  {text}",
        min(shutil.get_terminal_size().columns, _WIDEST),
        initial_indent="  ",
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
