"""Text that comes token by token is whole characters, and all of it in the end."""

import pytest
import tokenizers

from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.inference import chat, model_defaults
from caat_jax.inference.sampling import Sampling
from caat_jax.inference.text import Continuation, read_prompts
from tests.data.test_token_roles import write_json, write_tokenizer


@pytest.mark.parametrize(
    "content",
    [
        "plain",
        "é€😀",
        b"a\xe2\x82b",
        b"\xff\xff\xff\xff\xffa",
        b"\xf0\x9f\x98",
        b"\xff\xfe\xfd\xd9\x91n",
        b"",
    ],
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


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """A tokenizer.json in which characters are bytes of their own, as Llama's has them."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "o", "f"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(names[:3])
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(str(path))


def test_characters_in_a_row_stay_whole_where_bytes_are_tokens(byte_fallback):
    text = "of🙂🙂 of"
    ids = byte_fallback.encode(text).tolist()
    continuation = Continuation(byte_fallback, [byte_fallback.bos_id, *ids[:2]])
    pieces = [continuation.add(token) for token in ids[2:]]
    assert "".join(pieces) + continuation.finish() == text[2:]
    assert [piece for piece in pieces if piece] == ["🙂", "🙂", " ", "o", "f"]


def test_bytes_that_nothing_completes_spoil_only_themselves(byte_fallback):
    ids = byte_fallback.encode("🙂").tolist()
    continuation = Continuation(byte_fallback, [byte_fallback.bos_id])
    pieces = [continuation.add(token) for token in [*ids, ids[0]]]
    assert [*pieces, continuation.finish()] == ["", "", "", "🙂", "", "\ufffd"]


def test_prompts_are_lines_and_nothing_else_splits_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\x0cstill one\r\ntwo\u2028still two\n".encode())
    assert read_prompts(path) == ["one\x0cstill one", "two\u2028still two"]


# ---- Chats and a model's own sampling ---------------------------------------------------------

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m['content'] }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>a{% endif %}
{% if messages[0].content == 'no' %}{{ raise_exception('never no') }}{% endif %}"""


@pytest.mark.parametrize("place", ["file", "field", "list"])
def test_a_chat_is_rendered_with_special_tokens(tmp_path, place):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="--chat needs a model with a chat template"):
        chat.chat_prompt(tokenizer, "hi", None)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        value = TEMPLATE if place == "field" else [dict(name="default", template=TEMPLATE)]
        write_json(tmp_path / "tokenizer_config.json", chat_template=value)
    start, end, hi = 3, 4, tokenizer.encode("hi").tolist()
    user, system = (tokenizer.encode(f"{role}\n").tolist() for role in ("user", "system"))
    asked = [start, *user, *hi, end, start, *tokenizer.encode("a").tolist()]
    assert chat.chat_prompt(tokenizer, "hi", None) == asked
    assert chat.chat_prompt(tokenizer, "hi", "hi") == [start, *system, *hi, end, *asked]
    with pytest.raises(InputError, match="never no"):
        chat.chat_prompt(tokenizer, "no", None)


def test_sampling_of_the_model(tmp_path):
    def sampling(**fields):
        write_json(tmp_path / "generation_config.json", **fields)
        return model_defaults.model_sampling(tmp_path, 5)

    with pytest.raises(InputError, match=r"generation_config\.json"):
        model_defaults.model_sampling(tmp_path, 5)
    assert sampling(temperature=0.6) == Sampling(seed=5)
    assert sampling(do_sample=True, top_p=0.9) == Sampling(1.0, 50, 0.9, 5)
    assert sampling(do_sample=True, temperature=0.6, top_k=7) == Sampling(0.6, 7, 1.0, 5)
    with pytest.raises(InputError, match=r"repetition_penalty=1\.1 is not supported"):
        sampling(repetition_penalty=1.1)
