"""Trains a byte-level BPE tokeniser on a corpus' training documents.

    python -m caat_jax.data.train_tokenizer --config=configs/tiny.py --vocab_size=4096 \\
        --output=tokenizer.json
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import os
import sys

import tokenizers
from absl import flags

from caat_jax import command_line
from caat_jax.config import user_paths
from caat_jax.config.sections import Config, DataConfig
from caat_jax.data import corpora
from caat_jax.errors import InputError

_ROLES = ["<|begin_of_text|>", "<|end_of_text|>"]
SMALLEST = 256 + len(_ROLES)


def train(data: DataConfig, vocab_size: int, output: str) -> int:
    """Writes a Hugging Face tokenizer.json; returns its number of ids.

    Args:
      data: the corpus; validation documents are not read.
      vocab_size: ids at most; a small corpus may not hold so many different pairs.
      output: replaced where it exists.

    Raises:
      InputError: before any work, when the arguments or the corpus cannot serve.
    """
    path = user_paths.expanded("--output", output)
    if vocab_size < SMALLEST:
        raise InputError(f"vocab_size={vocab_size} must be at least {SMALLEST}: bytes, BOS, EOS")
    if path.suffix != ".json":
        raise InputError(f"output={output} must end in .json, as data.tokenizer will require")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"output={output} cannot be written")
    data.check_own_text(names_tokenizer=False)
    documents = corpora.open_corpus(data).documents("train")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_ROLES,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def main(config: Config) -> None:
    vocab_size, output = flags.FLAGS.vocab_size, flags.FLAGS.output
    size = train(config.data, vocab_size, output)
    print(f"{output} has {size} ids; use it with --config.data.tokenizer={output}")


if __name__ == "__main__":
    # Not at import: commands that call `train` have flags of these names too.
    config_flag = command_line.config_flag()
    flags.DEFINE_integer("vocab_size", 4096, "Ids at most, those of bytes included.")
    flags.DEFINE_string("output", "tokenizer.json", "The file to write.")
    command_line.run(main, config_flag)
