"""Tokenisers: text to ids and back, with BOS and EOS ids.

Each library is imported for files of its kind only.
"""

import abc
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from caat_jax.config import user_paths
from caat_jax.errors import InputError

# (BOS, EOS) as tokenizer.json files name them; they do not say which token has which role.
_USUAL_NAMES = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("[BOS]", "[EOS]"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class Tokenizer(abc.ABC):
    """What all tokenisers do.

    Text that spells a special token, such as "</s>", is encoded like any other text: BOS and EOS
    come from the caller only.

    Attributes:
      size: ids are below it.
      bos_id: starts a document.
      eos_id: ends a document; may be `bos_id`.
      fingerprint: the same for the same vocabulary and rules.
    """

    size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], without BOS or EOS."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [tokens], without BOS or EOS."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of those ids; BOS, EOS and ids that the tokeniser does not have are left out."""
        roles = {self.bos_id, self.eos_id}
        return self._decode([int(i) for i in ids if 0 <= i < self.size and int(i) not in roles])

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class _Bytes(Tokenizer):
    size, bos_id, eos_id, fingerprint = 258, 256, 257, "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class _SentencePiece(Tokenizer):
    def __init__(self, name: str, content: bytes):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(content)
        except RuntimeError as error:
            raise InputError(f"data.tokenizer={name} is not a SentencePiece model") from error
        self.size = self._processor.get_piece_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        for role, i in (("start", self.bos_id), ("end", self.eos_id)):
            if i < 0:
                raise InputError(
                    f"data.tokenizer={name} has no token for the {role} of a document; train it"
                    " with bos_id and eos_id of 0 or more"
                )
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class _HuggingFace(Tokenizer):
    def __init__(self, name: str, content: bytes):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # The library raises bare Exceptions.
        except Exception as error:
            raise InputError(f"data.tokenizer={name} is not a tokenizer.json ({error})") from error
        # Such a file may also ask for documents to be truncated or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.size = max(vocabulary.values(), default=-1) + 1
        self.bos_id, self.eos_id = _roles(name, vocabulary)
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokeniser that `data.tokenizer` names.

    Args:
      name: "bytes" (an id is a byte of UTF-8; BOS 256, EOS 257), or the path of a SentencePiece
        *.model or of a Hugging Face tokenizer.json.

    Raises:
      InputError: there is no such tokeniser, or it lacks a token for BOS or EOS.
    """
    if name == "bytes":
        return _Bytes()
    kinds = {".model": _SentencePiece, ".json": _HuggingFace}
    path = user_paths.expanded("data.tokenizer", name)
    if path.suffix not in kinds:
        raise InputError(
            f'data.tokenizer={name} must be "bytes", a SentencePiece *.model or a tokenizer.json'
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data.tokenizer={name} cannot be read ({error.strerror})") from error
    return kinds[path.suffix](name, content)


def _roles(name: str, vocabulary: dict[str, int]) -> tuple[int, int]:
    known = [[vocabulary[n] for n in names if n in vocabulary] for names in _USUAL_NAMES]
    # A pair, or else one token for both.
    for ids in sorted(known, key=len, reverse=True):
        if ids:
            return ids[0], ids[-1]
    usual = ", ".join(dict.fromkeys(n for names in _USUAL_NAMES for n in names))
    raise InputError(
        f"data.tokenizer={name} has no tokens for the start and end of a document; add one of"
        f" {usual}"
    )
