"""Every command in the README and on the pages is run, in a short form, or has a reason not to be.

A page's commands run in their order, in one folder of their own that has what readers have: the
repository's files, their texts, and the runs that earlier pages made.
"""

import re
import shlex
import shutil

import pytest

from tests.command_line import REPOSITORY, flags_of, run_forked, write_texts

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))))

# What is not run, by a part of the command, and why.
NOT_HERE = {
    "pip install": "installs",
    "gcloud": "needs an account",
    "gs://": "needs a bucket; tests/checkpoints/test_in_bucket.py has a server of its own",
    "sbatch": "needs Slurm; tests/devices/test_processes.py reads the script",
    "--process_id=$process": "tests/devices/test_processes.py runs it",
    "$model": "a loop over commands of which the page has others",
    "--tasks=": "needs data sets; tests/evaluation/test_harness.py runs the harness",
    "-m benchmarks.": "tests/benchmarks has their short forms",
    "--topology=h100": "needs the compiler for GPUs",
}

RUN = {
    "model.layers": 1,
    "model.embed_dim": 16,
    "model.mlp_dim": 16,
    "mesh.simulated_devices": 0,
    "data.files": "books/*.txt",
    "data.sequence_length": 32,
    "data.holdout_every": 2,
    "train.global_batch": 8,
    "train.eval_sequences": 2,
}
# Fields and flags that make a command short, by its script or module; those that it has stay.
SHORT = {
    "train.py": flags_of(RUN | {"train.steps": 2}),
    "caat_jax.communication": flags_of(
        {
            "model.layers": 1,
            "model.embed_dim": 64,
            "model.mlp_dim": 64,
            "model.vocab_size": 64,
            "data.sequence_length": 32,
            "train.accumulation_steps": 1,
            "train.global_batch": 8,
        }
    ),
    "caat_jax.sweep": ["--list"],
    "caat_jax.sensitivity": ["--sequences=2"],
    "caat_jax.conversion": [
        "--files=books/*.txt",
        "--calibration_tokens=128",
        "--held_out_tokens=64",
    ],
    "generate.py": ["--max_new_tokens=8"],
    "caat_jax.data.train_tokenizer": ["--vocab_size=300"],
}
# What the pages leave to the reader.
NAMES = {
    "LLAMA_DIR": "llama",
    "SRC_DIR": "llama",
    "EXPORTED_DIR": "exported",
    "DST_DIR": "exported_too",
    "WORKDIR": "runs/imported",
}


def commands(page):
    """Those of its blocks, each as one line."""
    text = (REPOSITORY / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    starts = r"\s*(python|cp|pip|gcloud|sbatch) "
    return [" ".join(line.split()) for line in lines if re.match(starts, line)]


def reason_not_to(command):
    return next((reason for part, reason in NOT_HERE.items() if part in command), None)


def short(command):
    """Script and arguments: without what is optional, shortened."""
    words = shlex.split(re.sub(r"\s\[[^]]*\]", "", command), comments=True)[1:]
    for name, value in NAMES.items():
        words = [re.sub(rf"\b{name}\b", value, word) for word in words]
    module = words.pop(1) if words[0] == "-m" else words[0]
    given = {word.split("=")[0] for word in words}
    own_model = any(word.startswith("--config=runs/") for word in words)
    for flag in SHORT.get(module, []):
        is_of_model = flag.startswith(("--config.model.", "--config.data.seq"))
        if flag.split("=")[0] not in given and not (own_model and is_of_model):
            words.append(flag)
    words = ["--sequences=2" if word == "--sequences=-1" else word for word in words]
    if module == "caat_jax.communication":  # tests/communication compiles for pods
        words = [word for word in words if not word.startswith("--topology=")]
    if words[0] == "-m":
        words[0] = module.replace(".", "/")
        is_package = (REPOSITORY / words[0]).is_dir()
        words[0] += "/__main__.py" if is_package else ".py"
    return words


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the repository's files, texts, runs and a Llama."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("caat_jax", "configs", "docs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    write_texts(folder / "books")
    (folder / "book.txt").write_text("a book of some words " * 50)
    tiny = ["train.py", "--config=configs/tiny.py", *SHORT["train.py"]]
    for name, p in (("tiny", 0.5), ("half", 0.5), ("full", 1)):
        run(folder, [*tiny, f"--workdir=runs/{name}", f"--config.model.sync_factor={p}"])
    huggingface = "caat_jax/huggingface/__main__.py"
    run(folder, [huggingface, "export", "runs/full", "llama"])
    run(folder, [huggingface, "import", "llama", "runs/imported"])
    shutil.copytree(folder / "runs/full", folder / f"runs/sweep/runs/{SWEPT}")
    return folder


SWEPT = "sync_factor_1.0-tp_shards_8-seed_0"


def run(folder, words):
    code, stdout, stderr = run_forked(words, folder)
    assert code == 0, (words, stdout, stderr)


def made_anew(words):
    """The folders that a command makes, or goes on with, which a reader does not have yet."""
    flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    if words[0] == "train.py" and flags["--config"].startswith("configs/"):
        return [flags["--workdir"]]
    if words[0] == "caat_jax/conversion/__main__.py":
        return [flags["--output"]]
    return [words[3]] if words[1] in ("import", "export") else []


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_a_page(made, tmp_path, page):
    folder = tmp_path / "reader"
    shutil.copytree(made, folder)
    for command in commands(page):
        if command.startswith("cp -r "):
            source, copy = command.split()[2:]
            shutil.copytree(folder / source, folder / copy)
        elif reason_not_to(command) is None:
            words = short(command)
            for name in made_anew(words):
                shutil.rmtree(folder / name, ignore_errors=True)
            run(folder, words)


def test_reasons_are_needed():
    every = [command for page in PAGES for command in commands(page)]
    assert [part for part in NOT_HERE if not any(part in command for command in every)] == []
