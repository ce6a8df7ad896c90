"""Continues text with a run's newest checkpoint.

python generate.py --workdir=runs/tiny --prompt="def main(" [--max_new_tokens=128]
    [--temperature=0.8 --top_k=40 --top_p=0.95 --seed=1] [--sampling=model]
    [--chat [--system=TEXT]] [--special_tokens]

One prompt is printed at once, and what follows it as it comes.  Several (--prompt again and again,
or --prompt_file with one a line) run together; each is printed when it and those before it are
done.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import dataclasses
import sys
from collections.abc import Iterator

from absl import flags

from caat_jax import command_line
from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.trained import restore_model, tokenizer_of
from caat_jax.config import user_paths
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.devices import processes
from caat_jax.errors import InputError
from caat_jax.inference import chat, model_defaults, text
from caat_jax.inference import generator as generator_lib
from caat_jax.inference.sampling import Sampling
from caat_jax.storage import mirrors

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given repeatedly.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", "", "A UTF-8 file with one prompt a line.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "For each prompt; with it they end at data.sequence_length."
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Prompts are a user's turns in a chat, for the model to answer."
)
_SYSTEM = flags.DEFINE_string("system", None, "With --chat: the system's turn before the user's.")
_SPECIAL_TOKENS = flags.DEFINE_bool(
    "special_tokens", False, "Special tokens that prompts spell, such as </s>, become those tokens."
)
_SAMPLING = flags.DEFINE_enum(
    "sampling", "flags", ["flags", "model"], "Drawn by these flags; or, where they say nothing, as"
    " the model's generation_config.json has it."
)  # fmt: skip
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only so many of the likeliest tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this probability together.")
_SEED = flags.DEFINE_integer("seed", 0, "The same one draws the same tokens.")
processes.define_flags()


def main() -> None:
    prompts = _prompts()
    # Checked before a checkpoint is loaded, which may take minutes.
    generator_lib.check_new_tokens(_MAX_NEW_TOKENS.value)
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
    workdir = mirrors.folder("--workdir", _WORKDIR.value)
    processes.start()
    step, config = checkpoints.newest_config(workdir)
    tokenizer = tokenizer_of(config, workdir)
    if _SAMPLING.value == "model":
        sampling = _model_sampling(tokenizer)
    inputs = [_input(tokenizer, prompt) for prompt in prompts]
    command_line.simulate_devices(config.mesh)
    generator = text.TextGenerator(restore_model(workdir, step, config))
    pieces = generator.stream(inputs, max_new_tokens=_MAX_NEW_TOKENS.value, sampling=sampling)
    # Whatever the terminal is set to: a character that it cannot show must not end the program.
    sys.stdout.reconfigure(encoding="utf-8")
    with processes.silent_unless_first():
        # An answer is shown without its question.
        _print_texts([""] * len(prompts) if _CHAT.value else prompts, pieces)


def _input(tokenizer: Tokenizer, prompt: str) -> str | list[int]:
    """The prompt as the generator takes it: a text, or ids where they are not those of the text."""
    if _CHAT.value:
        return chat.chat_prompt(tokenizer, prompt, _SYSTEM.value)
    if _SPECIAL_TOKENS.value:
        return [*tokenizer.prefix, *tokenizer.encode_special(prompt).tolist()]
    return prompt


def _model_sampling(tokenizer: Tokenizer) -> Sampling:
    sampling = model_defaults.model_sampling(tokenizer.folder, _SEED.value)
    given = {flag.name: flag.value for flag in (_TEMPERATURE, _TOP_K, _TOP_P) if flag.present}
    return dataclasses.replace(sampling, **given)


def _print_texts(prompts: list[str], pieces: Iterator[tuple[int, str, bool]]) -> None:
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for _, piece, _ in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts, done, printed = list(prompts), set(), 0
    for number, piece, is_all in pieces:
        texts[number] += piece
        if is_all:
            done.add(number)
        while printed in done:
            print(f"--- prompt {printed + 1} ---\n{texts[printed]}", flush=True)
            printed += 1


def _prompts() -> list[str]:
    if _SYSTEM.value is not None and not _CHAT.value:
        raise InputError("--system is a turn of a chat; give --chat too")
    if _CHAT.value and _SPECIAL_TOKENS.value:
        raise InputError("--special_tokens is about prompts without --chat; give one of the two")
    if bool(_PROMPT.value) == bool(_PROMPT_FILE.value):
        raise InputError("give --prompt or --prompt_file, one of the two")
    if _PROMPT_FILE.value:
        return text.read_prompts(user_paths.expanded("--prompt_file", _PROMPT_FILE.value))
    if "" in _PROMPT.value:
        raise InputError("--prompt is empty; give some text")
    for given in (*_PROMPT.value, _SYSTEM.value or ""):
        try:
            given.encode()
        except UnicodeEncodeError as error:  # Python keeps an argument's bytes that are not UTF-8
            raise InputError(f"{given!a} is not UTF-8 at character {error.start}") from None
    return _PROMPT.value


if __name__ == "__main__":
    command_line.run(main)
