"""Every field of the configuration is read by the programs that it configures."""

import dataclasses
import sys
from pathlib import Path

import pytest

from caat_jax import command_line
from caat_jax.config import stored
from caat_jax.config.resolve import resolve
from caat_jax.config.sections import Config
from caat_jax.data import corpora
from caat_jax.errors import InputError
from caat_jax.training import loop
from configs import base
from tests import models
from tests.command_line import write_texts

PACKAGE = Path(command_line.__file__).parent
SECTIONS = {field.name: field.type for field in dataclasses.fields(Config) if field.name != "seed"}
FIELDS = {
    f"{section}.{field.name}"
    for section, type_ in SECTIONS.items()
    for field in dataclasses.fields(type_)
}


def record_reads(monkeypatch):
    """The set of fields that the package has read, from now on.

    Comparing, copying and writing a whole section, as `dataclasses` and `config/stored.py` do, is
    no read of its fields.
    """
    found = set()

    def watch(section, type_):
        names = {field.name for field in dataclasses.fields(type_)}

        def get(self, name):
            if name in names:
                reader = Path(sys._getframe(1).f_code.co_filename)
                if reader.is_relative_to(PACKAGE) and reader != Path(stored.__file__):
                    found.add(f"{section}.{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(type_, "__getattribute__", get)

    for section, type_ in SECTIONS.items():
        watch(section, type_)
    return found


def configuration(folder):
    """One that uses what is off in `configs/base.py`."""
    config = base.get_config()
    config.model.update(models.SMALL | dict(layers=1, rope_scaling_factor=2.0, vocab_size=-1))
    config.data.update(
        files=f"{write_texts(folder / 'texts')}/*.txt",
        cache_dir=f"{folder}/cache",
        holdout_every=2,
        sequence_length=16,
    )
    config.optimizer.warmup_steps = 0
    config.train.update(steps=2, global_batch=8, profile_step=1)
    return resolve(config)


def test_no_field_that_nothing_reads(tmp_path, monkeypatch):
    config = configuration(tmp_path)
    data_set = dataclasses.replace(config.data, tfds_name="poems", files="")
    # Only now, since `resolve` reads all fields to check them.
    read = record_reads(monkeypatch)
    command_line.simulate_devices(config.mesh)
    loop.train(config, tmp_path / "run")
    with pytest.raises(InputError, match="poems is not"):
        corpora.open_corpus(data_set)
    assert FIELDS - read == set()
