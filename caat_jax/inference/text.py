"""Text from text: a run's checkpoint continues prompts, and what is printed is always whole."""

from collections.abc import Iterator
from pathlib import Path

from caat_jax.checkpoints.trained import TrainedModel
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError
from caat_jax.inference.generator import Generator
from caat_jax.inference.sampling import Sampling

# What tokenisers decode invalid UTF-8 to, such as the first bytes of a character.
_NOT_UTF8 = "\N{REPLACEMENT CHARACTER}"
# So many bytes of a character may lie before its last one, some tokenisers giving one for each.
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
        prompts: list[str],
        *,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Iterator[tuple[int, str, bool]]:
        """(number of a prompt, what follows its text so far, whether that is all), as it comes.

        Each prompt starts a document, and ends with the document.  The arguments
        are those of `Generator.generate`, which raises `InputError` here at once.
        """
        tokenizer = self._tokenizer
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
        steps = self._generator.stream(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=(tokenizer.eos_id,),
        )
        return _texts(steps, [Continuation(tokenizer, prompt) for prompt in ids])


class Continuation:
    """Token by token, the text that follows a prompt, in whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        # Decoded with the prompt: the same token may mean " word" after it and "word" alone.
        self._shown = len(tokenizer.decode(prompt_ids))

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        unfinished = len(text) - len(text.rstrip(_NOT_UTF8))
        return self._show(text[: len(text) - min(unfinished, _LONGEST_UNFINISHED)])

    def finish(self) -> str:
        """What was held back: bytes that no others completed, as replacement characters."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new


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
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise InputError(f"--prompt_file={path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt_file={path} is not UTF-8 at byte {error.start}") from error
    if not lines:
        raise InputError(f"--prompt_file={path} is empty; write one prompt a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"--prompt_file={path}: line {number} is empty; write a prompt there")
    return lines
