"""Text from text: a run's checkpoint continues prompts, and what is printed is always whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from caat_jax.checkpoints.trained import TrainedModel
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError
from caat_jax.inference.generator import Generator
from caat_jax.inference.sampling import Sampling

# What tokenisers decode invalid UTF-8 to, such as the first bytes of a character.
_NOT_UTF8 = "\N{REPLACEMENT CHARACTER}"
# The most tokens of one character before its last, some tokenisers giving one for each byte.
_LONGEST_UNFINISHED = 3


class TextGenerator:
    """Continues texts with the model of one checkpoint."""

    def __init__(self, model: TrainedModel):
        """Lays out the weights for inference.

        Raises:
          InputError: the tokeniser cannot be loaded, or does not fit the model.
        """
        self._tokenizer = model.tokenizer
        self._generator = Generator(
            model.config, model.mesh, model.parameters, self._tokenizer.size
        )

    def stream(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Iterator[tuple[int, str, bool]]:
        """(number of a prompt, what follows its text so far, whether that is all), as it comes.

        Each prompt starts a document, and ends with the document.  The other arguments are those of
        `Generator.generate`, which raises `InputError` here at once.

        Args:
          prompts: texts; or ids, in which the start of a document is theirs to say.
          max_new_tokens: of each prompt.
          sampling: how each token is chosen.
        """
        ids = [self._ids(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        steps = self._generator.stream(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self._tokenizer.roles.stop_ids,
        )
        return _texts(steps, [Continuation(self._tokenizer, prompt) for prompt in ids])

    def _ids(self, prompt: str) -> list[int]:
        tokenizer = self._tokenizer
        return [*tokenizer.prefix, *tokenizer.encode(prompt).tolist()] or [tokenizer.bos_id]


class Continuation:
    """Token by token, the text that follows a prompt, in whole characters.

    What a token means may depend on those before it: " word" may be "word" at the start of a text.
    So each piece is decoded after the tokens of the piece before, whose text is taken off again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._before, self._pending = list(prompt_ids), []

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        self._pending.append(token)
        whole = self._text(self._pending)
        if not whole.endswith(_NOT_UTF8):
            self._before, self._pending = self._pending, []
            return whole
        if len(self._pending) <= _LONGEST_UNFINISHED:
            return ""
        # Nothing completes the first of them any more; the others may be of another character.
        first, self._pending = self._pending[:1], self._pending[1:]
        text = self._text(first)
        self._before = first
        return text

    def finish(self) -> str:
        """What was held back: bytes that no others completed, as replacement characters."""
        return self._text(self._pending) if self._pending else ""

    def _text(self, tokens: list[int]) -> str:
        """That of tokens after those before."""
        before = self._tokenizer.decode(self._before)
        both = self._tokenizer.decode([*self._before, *tokens])
        if both.startswith(before):
            return both[len(before) :]
        # Incomplete bytes can spoil the bytes before them, which have been shown already.
        return self._tokenizer.decode(tokens)


def _texts(
    steps: Iterator[dict[int, int]], continuations: list[Continuation]
) -> Iterator[tuple[int, str, bool]]:
    unfinished = set(range(len(continuations)))
    for tokens in steps:
        for row in sorted(unfinished - tokens.keys()):
            yield row, continuations[row].finish(), True
        unfinished &= tokens.keys()
        for row, token in tokens.items():
            yield row, continuations[row].add(token), False
    for row in sorted(unfinished):
        yield row, continuations[row].finish(), True


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
      InputError: the file cannot be read, is not UTF-8, or has an empty line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--prompt_file={path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt_file={path} is not UTF-8 at byte {error.start}") from error
    # Not `splitlines`, to which form feeds and others are ends of lines too.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text:
        raise InputError(f"--prompt_file={path} is empty; write one prompt a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"--prompt_file={path}: line {number} is empty; write a prompt there")
    return lines
