"""What the files beside a tokeniser say of it, and a tokeniser that goes with its workdir."""

import json

import pytest
import tokenizers as huggingface

from caat_jax.data import carried_tokenizer, token_roles, tokenizers
from caat_jax.errors import InputError

NAMES = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def write_tokenizer(path, *, special=NAMES[:5], start=None):
    """An id for each of NAMES and each letter; the processor puts `start` before a text."""
    names = [*NAMES, *"abcdefghijklmnopqrstuvwxyz<>/|_ \n"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = huggingface.Tokenizer(huggingface.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    if start:
        tokenizer.post_processor = huggingface.processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return str(path)


def write_json(path, **fields):
    path.write_text(json.dumps(fields))


def test_roles_of_the_files_in_their_order(tmp_path):
    name = write_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizers.load_tokenizer(name).roles[:2] == (2, 2)  # <|endoftext|> by its name
    assert tokenizers.load_tokenizer(name).roles.source == token_roles.USUAL_NAMES
    fields = dict(bos_token="<|startoftext|>", eos_token={"content": "<|endoftext|>"})
    write_json(tmp_path / "tokenizer_config.json", **fields)
    assert tokenizers.load_tokenizer(name).roles == (1, 2, (2,), "tokenizer_config.json")
    write_json(tmp_path / "config.json", bos_token_id=3, eos_token_id=4)
    assert tokenizers.load_tokenizer(name).roles == (3, 4, (4,), "config.json")
    write_json(tmp_path / "generation_config.json", eos_token_id=[4, 2])
    assert tokenizers.load_tokenizer(name).roles == (3, 4, (4, 2), "generation_config.json")
    write_json(tmp_path / "generation_config.json", eos_token_id=99)
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id=99 is not"):
        tokenizers.load_tokenizer(name)


def test_pieces_that_are_spelled_like_roles_have_none(tmp_path):
    name = write_tokenizer(tmp_path / "tokenizer.json", special=["<unk>"])
    with pytest.raises(InputError, match="no tokens for the start and end"):
        tokenizers.load_tokenizer(name)


def test_other_roles_are_another_tokeniser(tmp_path):
    name = write_tokenizer(tmp_path / "tokenizer.json")
    by_name = tokenizers.load_tokenizer(name).fingerprint
    write_json(tmp_path / "config.json", bos_token_id=3, eos_token_id=4)
    assert tokenizers.load_tokenizer(name).fingerprint != by_name


def test_an_imported_model_gets_what_its_tokeniser_adds(tmp_path):
    fields = dict(bos_token_id=3, eos_token_id=4)
    for start, prefix in ((None, ()), ("<|im_start|>", (3,))):
        name = write_tokenizer(tmp_path / str(start) / "tokenizer.json", start=start)
        write_json(tmp_path / str(start) / "config.json", **fields)
        assert tokenizers.load_tokenizer(name, is_imported=True).prefix == prefix
        assert tokenizers.load_tokenizer(name).prefix == (3,)


def test_special_tokens_in_a_text(tmp_path):
    tokenizer = tokenizers.load_tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_special("a<|im_end|>").tolist() == [7, 4]
    assert 4 not in tokenizer.encode("a<|im_end|>").tolist()


def test_a_workdir_carries_its_tokeniser(tmp_path):
    name = write_tokenizer(tmp_path / "elsewhere" / "words.json")
    write_json(tmp_path / "elsewhere" / "tokenizer_config.json", eos_token="<|im_end|>")
    workdir = tmp_path / "run"
    workdir.mkdir()
    expected = carried_tokenizer.load_for_training(name, workdir)
    carried_tokenizer.carry(name, workdir)
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    workdir.rename(tmp_path / "moved")
    found = carried_tokenizer.load(name, tmp_path / "moved")
    assert (found.fingerprint, found.roles) == (expected.fingerprint, expected.roles)
    again = carried_tokenizer.load_for_training(name, tmp_path / "moved")
    assert again.fingerprint == expected.fingerprint
