"""Tokenisers: text to ids and back, with BOS and EOS ids.

Each library is imported for files of its kind only.
"""

import abc
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from caat_jax.config import user_paths
from caat_jax.data import token_roles
from caat_jax.data.token_roles import Roles
from caat_jax.errors import InputError


class Tokenizer(abc.ABC):
    """What all tokenisers do.

    Text that spells a special token, such as "</s>", is encoded like any other text, but by
    `encode_special`.

    Attributes:
      size: ids are below it.
      roles: BOS, EOS and the ids that end a text.
      prefix: what comes before a document or prompt: BOS, or what the model of the tokeniser takes.
      fingerprint: the same for the same vocabulary, rules, roles and prefix.
      folder: of its file and those beside it; None for bytes.
    """

    size: int
    roles: Roles
    prefix: tuple[int, ...]
    fingerprint: str
    folder: Path | None = None

    @property
    def bos_id(self) -> int:
        """Starts a document."""
        return self.roles.bos_id

    @property
    def eos_id(self) -> int:
        """Ends a document; may be `bos_id`."""
        return self.roles.eos_id

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], without BOS or EOS."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [tokens], without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> np.ndarray:
        """`encode`, but where the text spells a special token it becomes that token."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of those ids; BOS, EOS and ids that the tokeniser does not have are left out."""
        roles = {self.bos_id, self.eos_id}
        return self._decode([int(i) for i in ids if 0 <= i < self.size and int(i) not in roles])

    @abc.abstractmethod
    def token(self, token_id: int) -> str:
        """The name of a token."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class _Bytes(Tokenizer):
    size, roles, prefix, fingerprint = 258, Roles(256, 257, (257,), "bytes"), (256,), "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def token(self, token_id: int) -> str:
        return f"<{token_id}>"

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class _File(Tokenizer):
    """One of a file: a path as `data.tokenizer` names it."""

    def __init__(self, name: str, path: Path, content: bytes, is_imported: bool):
        self.folder = path.parent
        self._load(name, content)
        roles = token_roles.declared(self.folder, self.size, self._id_of)
        self.roles = roles or self._own_roles(name)
        self.prefix = self._own_prefix() if is_imported else (self.bos_id,)
        digest = hashlib.blake2b(content, digest_size=16)
        if roles or is_imported:
            digest.update(repr((self.bos_id, self.eos_id, self.prefix)).encode())
        self.fingerprint = digest.hexdigest()

    @abc.abstractmethod
    def _load(self, name: str, content: bytes) -> None:
        """Sets `size` too."""

    @abc.abstractmethod
    def _id_of(self, token: str) -> int | None: ...

    @abc.abstractmethod
    def _own_roles(self, name: str) -> Roles:
        """Where the files beside it say nothing."""

    @abc.abstractmethod
    def _own_prefix(self) -> tuple[int, ...]:
        """What the tokeniser itself puts before a text."""


class _SentencePiece(_File):
    def _load(self, name: str, content: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(content)
        except RuntimeError as error:
            raise InputError(f"data.tokenizer={name} is not a SentencePiece model") from error
        self.size = self._processor.get_piece_size()
        controls = map(self.token, filter(self._processor.is_control, range(self.size)))
        self._control = re.compile("(" + ("|".join(map(re.escape, controls)) or "(?!)") + ")")

    def _id_of(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None

    def _own_roles(self, name: str) -> Roles:
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        for role, i in (("start", bos_id), ("end", eos_id)):
            if i < 0:
                raise InputError(
                    f"data.tokenizer={name} has no token for the {role} of a document; train it"
                    " with bos_id and eos_id of 0 or more"
                )
        return Roles(bos_id, eos_id, (eos_id,), name)

    def _own_prefix(self) -> tuple[int, ...]:
        # Such a file has no rule for it; Llama's tokeniser adds BOS unless it is told not to.
        fields = token_roles.fields_of(self.folder / token_roles.TOKENIZER_CONFIG)
        return (self.bos_id,) if fields.get("add_bos_token", True) else ()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def encode_special(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for part in filter(None, self._control.split(text)):
            is_control = self._control.fullmatch(part)
            ids += [self._id_of(part)] if is_control else self._processor.encode(part)
        return np.array(ids, np.int32)

    def token(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class _HuggingFace(_File):
    def _load(self, name: str, content: bytes) -> None:
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
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def _id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _own_roles(self, name: str) -> Roles:
        # Only special tokens: ordinary pieces may be spelled like them.
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        roles = token_roles.by_usual_names(special)
        if roles is None:
            raise InputError(
                f"data.tokenizer={name} has no tokens for the start and end of a document; put a"
                f" {token_roles.TOKENIZER_CONFIG} with bos_token and eos_token beside it, or add"
                f" special tokens of the names {token_roles.usual_names()}"
            )
        return roles

    def _own_prefix(self) -> tuple[int, ...]:
        encoding = self._tokenizer.encode("a")
        end = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else None
        return tuple(encoding.ids[:end])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_special(self, text: str) -> np.ndarray:
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def load_tokenizer(name: str, *, is_imported: bool = False) -> Tokenizer:
    """The tokeniser that `data.tokenizer` names.

    The files beside it (`token_roles.FILES`) say which tokens have which role.

    Args:
      name: "bytes" (an id is a byte of UTF-8; BOS 256, EOS 257), or the path of a SentencePiece
        *.model or of a Hugging Face tokenizer.json.
      is_imported: whether it belongs to a model trained elsewhere, whose texts then start with
        what its own rules add, perhaps nothing, rather than with BOS.

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
    return kinds[path.suffix](name, path, content, is_imported)
