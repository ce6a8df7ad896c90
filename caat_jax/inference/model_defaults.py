"""How a model's own `generation_config.json` says that its tokens are to be drawn."""

import dataclasses
from pathlib import Path

from caat_jax.data import token_roles
from caat_jax.errors import InputError
from caat_jax.inference.sampling import Sampling

# Of `transformers`, where the file asks for sampling and leaves the value out.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_NEUTRAL = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "num_beams": 1}


def model_sampling(folder: Path | None, seed: int) -> Sampling:
    """The sampling that the file in a tokeniser's folder asks for: the most likely token, or draws.

    Raises:
      InputError: there is no such file, or it asks for something that there is not here.
    """
    path = (folder or Path()) / token_roles.GENERATION_CONFIG
    if folder is None or not path.is_file():
        raise InputError(f"--sampling=model needs a model with a {token_roles.GENERATION_CONFIG}")
    fields = token_roles.fields_of(path)
    for name, neutral in _NEUTRAL.items():
        if fields.get(name) not in (None, neutral):
            raise InputError(f"{path}: {name}={fields[name]} is not supported; give flags instead")
    if not fields.get("do_sample", False):
        return Sampling(seed=seed)
    given = {name: fields.get(name, default) for name, default in _DEFAULTS.items()}
    given = {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}
    if not all(type(value) in (int, float) for value in given.values()):
        raise InputError(f"{path}: {', '.join(_DEFAULTS)} must be numbers")
    return dataclasses.replace(Sampling(**given), seed=seed)
