"""Prompts of chat models: a user's turn in the form that the model was trained on."""

import datetime
import json
from pathlib import Path
from typing import Any, NoReturn

from caat_jax.data import token_roles
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError


def chat_prompt(tokenizer: Tokenizer, user: str, system: str | None) -> list[int]:
    """The ids of a conversation whose next turn is the model's.

    Args:
      tokenizer: of the model; the chat template lies beside its file.
      user: the user's turn.
      system: the system's turn before it, None for none.

    Raises:
      InputError: there is no template, or it refuses these turns.
    """
    turns = [{"role": "user", "content": user}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    text = _rendered(
        _template(tokenizer.folder),
        messages=turns,
        add_generation_prompt=True,
        bos_token=tokenizer.token(tokenizer.bos_id),
        eos_token=tokenizer.token(tokenizer.eos_id),
        **_other_tokens(tokenizer.folder),
    )
    return tokenizer.encode_special(text).tolist()


def _template(folder: Path | None) -> str:
    path = folder and folder / "chat_template.jinja"
    if path and path.is_file():
        return path.read_text()
    fields = token_roles.fields_of(folder / token_roles.TOKENIZER_CONFIG) if folder else {}
    template = fields.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {one.get("name"): one.get("template") for one in template}.get("default")
    if not isinstance(template, str):
        raise InputError(
            "--chat needs a model with a chat template: chat_template.jinja, or chat_template in"
            f" {token_roles.TOKENIZER_CONFIG}, beside its tokeniser"
        )
    return template


def _other_tokens(folder: Path) -> dict[str, Any]:
    """Such as pad_token and unk_token, which a template may name."""
    fields = token_roles.fields_of(folder / token_roles.TOKENIZER_CONFIG)
    return {
        name: token_roles.text_of(value)
        for name, value in fields.items()
        if name.endswith("_token") and name not in ("bos_token", "eos_token", "add_bos_token")
    }


def _rendered(template: str, **values: Any) -> str:
    import jinja2
    import jinja2.sandbox

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    # As `transformers` sets it up, for which templates are written.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(**values)
    except Exception as error:  # a template is a program
        raise InputError(f"the chat template cannot be used: {error}") from None
