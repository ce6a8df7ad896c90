"""Which tokens start and end a document: what the files beside a tokeniser say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from caat_jax.errors import InputError
from caat_jax.files import read_json

GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What belongs to a tokeniser beside its own file: its roles and its chat template.
FILES = (
    GENERATION_CONFIG,
    CONFIG,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

USUAL_NAMES = "their usual names"
# (BOS, EOS) where no file says which token has which role.
_USUAL_NAMES = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("[BOS]", "[EOS]"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class Roles(NamedTuple):
    """BOS, EOS, all ids that end a text (EOS is the first), and where this stands."""

    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    source: str


def fields_of(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is no file.

    Raises:
      InputError: the file holds something else.
    """
    try:
        return read_json(path, dict)
    except FileNotFoundError:
        return {}


def text_of(token: Any) -> Any:
    """A special token's text, which these files have bare or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def declared(folder: Path, size: int, id_of: Callable[[str], int | None]) -> Roles | None:
    """The roles that the files in a tokeniser's folder declare; None without an EOS.

    Where only a BOS is missing, EOS has both roles.

    Args:
      folder: of the tokeniser.
      size: of the tokeniser; ids are below it.
      id_of: the id of a token, None where there is none.

    Raises:
      InputError: a file cannot be read, or names a token that the tokeniser does not have.
    """
    eos = _declared(folder, "eos", size, id_of)
    if eos is None:
        return None
    stop_ids, source = eos
    bos = _declared(folder, "bos", size, id_of)
    return Roles(bos[0][0] if bos else stop_ids[0], stop_ids[0], stop_ids, source)


def _declared(
    folder: Path, role: str, size: int, id_of: Callable[[str], int | None]
) -> tuple[tuple[int, ...], str] | None:
    for name in (GENERATION_CONFIG, CONFIG, TOKENIZER_CONFIG, "special_tokens_map.json"):
        fields = fields_of(folder / name)
        key = f"{role}_token_id" if name in (GENERATION_CONFIG, CONFIG) else f"{role}_token"
        value = fields.get(key)
        if value is None or value == []:
            continue
        if key == f"{role}_token":
            ids = [id_of(str(text_of(value)))]
        else:
            ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < size for i in ids):
            raise InputError(f"{folder / name}: {key}={value} is not a token of the tokeniser")
        return tuple(ids), name
    return None


def by_usual_names(tokens: dict[str, int]) -> Roles | None:
    """The roles of special tokens that have usual names; None where none has."""
    known = [[tokens[name] for name in names if name in tokens] for names in _USUAL_NAMES]
    # A pair, or else one token for both.
    for ids in sorted(known, key=len, reverse=True):
        if ids:
            return Roles(ids[0], ids[-1], (ids[-1],), USUAL_NAMES)
    return None


def usual_names() -> str:
    """For messages."""
    return ", ".join(dict.fromkeys(name for names in _USUAL_NAMES for name in names))
