import io

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface

from caat_jax.data import tokenizers
from caat_jax.errors import InputError

TEXTS = [
    "Plain text.",
    "  two  spaces\n\ttab\r\n",
    "Příliš žluťoučký kůň 🐎 日本語",
    "",
    "it spells </s> and <s> itself",
]


def _sentencepiece(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=298,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def _huggingface(path, roles=("<s>", "</s>"), **cut):
    tokenizer = huggingface.Tokenizer(huggingface.models.BPE())
    tokenizer.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = huggingface.decoders.ByteLevel()
    alphabet = huggingface.pre_tokenizers.ByteLevel.alphabet()
    trainer = huggingface.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(roles), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = huggingface.processors.TemplateProcessing(
        single=f"{roles[0]} $A", special_tokens=[(roles[0], 0)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(request, tmp_path):
    names = {
        "bytes": lambda: "bytes",
        "sentencepiece": lambda: _sentencepiece(tmp_path / "sp.model"),
        "huggingface": lambda: _huggingface(tmp_path / "tokenizer.json"),
    }
    return tokenizers.load_tokenizer(names[request.param]())


def test_round_trip(tokenizer):
    roles = {tokenizer.bos_id, tokenizer.eos_id}
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert np.array_equal(ids, tokenizer.encode(text))
        assert not roles & set(ids.tolist())
        assert tokenizer.decode(ids) == text
        # A padded vocabulary has ids that the tokeniser has not.
        framed = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.size, -1]
        assert tokenizer.decode(framed) == text
    assert 0 <= min(roles) and max(roles) < tokenizer.size


def test_bytes():
    tokenizer = tokenizers.load_tokenizer("bytes")
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.size) == (256, 257, 258)
    assert tokenizer.decode([97, 0xC3]) == "a�"


def test_fingerprints_differ(tmp_path):
    names = [
        "bytes",
        _huggingface(tmp_path / "a.json"),
        _huggingface(tmp_path / "b.json", ("<bos>", "<eos>")),
        _sentencepiece(tmp_path / "c.model"),
    ]
    assert len({tokenizers.load_tokenizer(name).fingerprint for name in names}) == 4


@pytest.mark.parametrize(
    ("roles", "bos_id", "eos_id"),
    [
        (("<|begin_of_text|>", "<|end_of_text|>"), 0, 1),
        (("<pad>", "[EOS]", "[BOS]"), 2, 1),
        (("<|endoftext|>",), 0, 0),
        (("<pad>", "</s>"), 1, 1),
        (("<s>", "<|endoftext|>", "</s>"), 0, 2),
    ],
    ids=str,
)
def test_roles_by_their_usual_names(tmp_path, roles, bos_id, eos_id):
    tokenizer = tokenizers.load_tokenizer(_huggingface(tmp_path / "t.json", roles))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)


def _spoiled(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda d: "byte", 'must be "bytes", a SentencePiece *.model or a tokenizer.json'),
        (lambda d: str(d / "no.json"), "no.json cannot be read (No such file or directory)"),
        (lambda d: str(d / "no.model"), "no.model cannot be read (No such file or directory)"),
        (lambda d: _spoiled(d / "t.json", b"{}"), "t.json is not a tokenizer.json ("),
        (lambda d: _spoiled(d / "t.model", b"x"), "t.model is not a SentencePiece model"),
        (lambda d: _spoiled(d / "t.model", b""), "t.model is not a SentencePiece model"),
        (lambda d: _huggingface(d / "t.json", ("[CLS]",)), "names <|begin_of_text|>, "),
        (lambda d: _sentencepiece(d / "t.model", bos_id=-1), "no token for the start of a"),
        (lambda d: _sentencepiece(d / "t.model", eos_id=-1), "no token for the end of a"),
    ],
)
def test_bad_tokenizers(tmp_path, make, line):
    name = make(tmp_path)
    with pytest.raises(InputError) as caught:
        tokenizers.load_tokenizer(name)
    assert f"data.tokenizer={name}" in str(caught.value) and line in str(caught.value)
    assert "\n" not in str(caught.value)
