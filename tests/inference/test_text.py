"""Text that comes token by token is whole characters, and all of it in the end."""

import pytest

from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.inference.text import Continuation


@pytest.mark.parametrize(
    "content",
    ["plain", "é€😀", b"a\xe2\x82b", b"\xff\xff\xff\xff\xffa", b"\xf0\x9f\x98", b""],
    ids=repr,
)
def test_pieces_are_whole_characters_and_together_all(content):
    content = content.encode() if isinstance(content, str) else content
    tokenizer = load_tokenizer("bytes")
    continuation = Continuation(tokenizer, [tokenizer.bos_id, *"é".encode()])
    pieces = [continuation.add(byte) for byte in content]
    pieces.append(continuation.finish())
    assert "".join(pieces) == content.decode(errors="replace")
    if b"\xff" not in content and b"\xe2\x82b" not in content:
        assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_a_character_is_shown_with_its_last_byte():
    tokenizer = load_tokenizer("bytes")
    continuation = Continuation(tokenizer, [tokenizer.bos_id])
    assert [continuation.add(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
