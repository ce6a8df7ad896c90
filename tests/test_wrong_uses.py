"""Wrong uses of every command: exit code 2, one line that says what to do, nothing written.

`test_command_line.py` has those that need files, folders or a run.
"""

import pytest

from tests.command_line import REPOSITORY, TINY, assert_refused, run_here

TRAIN = ["train.py", TINY, "--workdir=x"]
EVAL = ["eval.py", "--workdir=x"]
GENERATE = ["generate.py", "--workdir=x", "--prompt=a"]
COMMUNICATION = ["caat_jax/communication/__main__.py", TINY]
CONVERSION = ["caat_jax/conversion/__main__.py", "--workdir=x", "--output=y"]
HUGGINGFACE = ["caat_jax/huggingface/__main__.py"]
PLOT = ["caat_jax/plot/__main__.py"]
SENSITIVITY = ["caat_jax/sensitivity/__main__.py", "--workdir=x"]
SWEEP = ["caat_jax/sweep/__main__.py", f"--config={REPOSITORY / 'configs/sweep.py'}"]
STEP_TIME = [
    *("caat_jax/step_time/__main__.py", TINY, "--devices=8"),
    *("--config.compute.dtype=bfloat16", "--config.model.vocab_size=264"),
]
TOKENIZER = ["caat_jax/data/train_tokenizer.py", TINY]

# What a user gives, and what of the answer names the error and what to do next.
USES = [
    ([*TRAIN, "--config.train.steps=6.5"], ["steps=6.5 must be a whole number"]),
    ([*TRAIN, "--config.train.steps"], ["Missing value", "--config.train.steps"]),
    ([*TRAIN, "--config.train.steps=0"], ["train.steps=0 must be at least 1"]),
    ([*TRAIN, "--config.train.eval_every=0"], ["train.eval_every=0 must be at least 1"]),
    ([*TRAIN, "--config.model.sync_factor=half"], ["sync_factor=half must be a number"]),
    ([*TRAIN, "--config.model.tied_head=maybe"], ["tied_head=maybe must be true or false"]),
    ([*TRAIN, "--config.model.sync_factor_per_layer=(1,"], ["must be a tuple, such as"]),
    (
        [*TRAIN, "--config.model.sync_factor_per_layer=(0.5,)"],
        ["has 1 entries; it must have one for each of the model.layers=4"],
    ),
    ([*TRAIN, "--config.model.heads=7"], ["model.heads=7", "model.tp_shards=8", "nearest", "8"]),
    ([*TRAIN, "--config.model.tp_shards=3"], ["model.tp_shards=3", "nearest that do: 6 or 9"]),
    ([*TRAIN, "--config.model.Layers=2"], ["nearest is config.model.layers"]),
    ([*TRAIN, "--config.compute.dtype=float16"], ["must be one of float32, bfloat16"]),
    ([*TRAIN, "--config.compute.attention=flash"], ["one of auto, plain, splash, cudnn"]),
    ([*TRAIN, "--config.compute.attention=cudnn"], ["cudnn", "it takes bfloat16"]),
    ([*TRAIN, "--config.compute.forward_wire_dtype=int4"], ["int4", "int8, float8_e4m3fn"]),
    ([*TRAIN, "--config.compute.wire_block=0"], ["wire_block=0 must be at least 1"]),
    ([*TRAIN, "--config.mesh.simulated_devices=5000"], ["must be at most 1024"]),
    ([*TRAIN, "--config.mesh.model=5"], ["mesh.model=5", "allowed: 1, 2, 4, 8"]),
    ([*TRAIN, "--config.seed=-1"], ["seed=-1 must be at least 0"]),
    ([*TRAIN, "--config.optimizer.peak_learning_rate=0"], ["must be above 0"]),
    ([*TRAIN, "--config.optimizer.warmup_steps=200"], ["optimizer.warmup_steps=-1"]),
    ([*TRAIN, "--config.optimizer.beta2=1"], ["beta2=1", "[0, 1)"]),
    ([*TRAIN, "--config.train.sync_schedule=((5,2),)"], ["=2 is outside [0, 1]"]),
    ([*TRAIN, "--config.train.sync_schedule=5"], ["train.sync_schedule", "5"]),
    ([*TRAIN, "--config.data.encoding_errors=skip"], ["one of strict, replace, ignore"]),
    ([*TRAIN, "--config.data.holdout_every=1"], ["holdout_every=1 must be at least 2"]),
    ([*TRAIN, "--config.data.files=/nope/*"], ["data.files=/nope/* matches no file"]),
    ([*TRAIN, "--config.data.files=/proc"], ["it is a folder, whose files are /proc/**/*"]),
    ([*TRAIN, "--config.data.files={a,b}.txt"], ["one pattern of *, ** and ?"]),
    ([*TRAIN, "--config.data.tfds_name=c4/en"], ["not under", "download_and_prepare()"]),
    (
        [*TRAIN, "--config.data.tfds_name=c4/en", "--config.data.files=x"],
        ["are both given; give one"],
    ),
    ([*TRAIN, "--config.data.tokenizer="], ["data.tokenizer is empty; give a path"]),
    ([*TRAIN, "--config.data.cache_dir="], ["data.cache_dir is empty; give a path"]),
    ([*TRAIN, "--config.data.cache_dir=/proc/x"], ["choose another data.cache_dir"]),
    ([*TRAIN, "--config.data.eval_split=train"], ["is data.train_split too"]),
    ([*TRAIN, "--workdir=/proc/x"], ["--workdir=/proc/x: "]),
    ([*TRAIN, "--workdir="], ["--workdir is empty; give a path"]),
    ([*TRAIN, "y"], ["'y' is not a flag; flags start with --"]),
    ([*TRAIN, "--resume"], ["--resume is not a flag", "--help"]),
    ([*TRAIN, "--work_dir=y"], ["the nearest is --workdir"]),
    ([*TRAIN, "--process_id=first"], ["--process_id=first must be a whole number"]),
    ([*TRAIN, "--process_id=-1"], ["--process_id=-1", "non-negative"]),
    ([*TRAIN, "--num_processes=0"], ["--num_processes=0", "positive"]),
    ([*TRAIN, "--num_processes=2"], ["missing: give all of --coordinator_address"]),
    (
        [*TRAIN, "--num_processes=2", "--process_id=2", "--coordinator_address=localhost:1"],
        ["--process_id=2 must be below --num_processes=2"],
    ),
    ([*EVAL], ["no checkpoint; python train.py --config=FILE --workdir=x writes one"]),
    ([*EVAL, "--task=piqa"], ["the nearest is --tasks"]),
    ([*EVAL, "--tasks=piqa", "--limit=0"], ["--limit=0", "positive"]),
    ([*EVAL, "--num_fewshot=2"], ["--num_fewshot is about tasks; give --tasks too"]),
    ([*EVAL, "--tasks="], ["--tasks lacks a name", "hellaswag"]),
    ([*EVAL, "--tasks=piqa,,arc_easy"], ["--tasks lacks a name"]),
    ([*EVAL, "--limit=3"], ["--limit", "give --tasks"]),
    ([*EVAL, "--include_path=."], ["--include_path", "give --tasks"]),
    ([*EVAL, "--tasks=piqa", "--batch_size=0"], ["--batch_size", "0"]),
    ([*EVAL, "--tasks=piqa", "--num_fewshot=-1"], ["--num_fewshot", "-1"]),
    ([*EVAL, "--tasks=piqa", "--config.data.files=x"], ["--config.data.files", "not about tasks"]),
    ([*EVAL, "--config.data.file=x"], ["nearest is config.data.files"]),
    ([*EVAL, "--config.data.holdout_every=x"], ["data.holdout_every", "x"]),
    ([*EVAL, "--config.train.steps=2"], ["only config.data can be overridden"]),
    ([*EVAL, "--config=configs/tiny.py"], ["--config=configs/tiny.py"]),
    ([*GENERATE], ["no checkpoint; python train.py --config=FILE --workdir=x writes one"]),
    ([*GENERATE, "more"], ["'more' is not a flag"]),
    ([*GENERATE, "--promt=b"], ["the nearest is --prompt"]),
    ([*GENERATE, "--sampling=wild"], ["<flags|model>"]),
    ([*GENERATE, "--chat=perhaps"], ["--chat=perhaps must be true or false"]),
    ([*GENERATE, "--max_new_tokens=many"], ["must be a whole number"]),
    ([*GENERATE, "--config.model.layers=2"], ["--config.model.layers is not a flag"]),
    ([*COMMUNICATION, "--program=loss"], ["not one of: train, prefill, decode"]),
    ([*COMMUNICATION, "--topology=tpu"], ["write it as in v5e:2x4"]),
    ([*COMMUNICATION, "--slices=2"], ["--slices=2 needs a --topology"]),
    ([*CONVERSION], ["no checkpoint; python train.py --config=FILE --workdir=x writes one"]),
    ([*CONVERSION, "--output="], ["--output is empty; give a path"]),
    ([*CONVERSION, "--output=gs://y"], ["is a URL; give a path"]),
    ([*CONVERSION, "--basis=wavelets"], ["<rotation|channels>"]),
    ([*CONVERSION, "--calibration_tokens=0"], ["--calibration_tokens=0", "positive"]),
    ([*CONVERSION, "--sync_factor=half"], ["--sync_factor=half must be a number"]),
    ([CONVERSION[0]], ["--workdir is missing; give", "--output is missing; give"]),
    ([*HUGGINGFACE], ["give import SRC_DIR WORKDIR, or export WORKDIR DST_DIR"]),
    ([*HUGGINGFACE, "import", "a"], ["import a: give import SRC_DIR WORKDIR"]),
    ([*HUGGINGFACE, "convert", "a", "b"], ["convert a b: give import SRC_DIR WORKDIR"]),
    ([*HUGGINGFACE, "import", "a", "b"], ["no config.json; give a folder with one"]),
    ([*HUGGINGFACE, "import", "s3://a", "b"], ["is a URL; give a path"]),
    ([*HUGGINGFACE, "export", "a", "b"], ["no checkpoint; python train.py"]),
    ([*HUGGINGFACE, "export", "a", "b", "--sync_factor=1"], ["not a flag of export", "--help"]),
    ([*PLOT], ["no run to plot; give the --workdir of one or more"]),
    ([*PLOT, "a"], ["a/metrics.jsonl", "train.py writes it into its --workdir"]),
    ([*PLOT, "a", "b", "--label=c"], ["1 --label for 2 runs; give one for each, or none"]),
    ([*PLOT, *"abcdefghi"], ["9 runs; more than 8 cannot be told apart"]),
    ([*PLOT, "~nobody_here/x"], ["there is no user nobody_here"]),
    ([*SENSITIVITY], ["no checkpoint; python train.py --config=FILE --workdir=x writes one"]),
    ([*SENSITIVITY, "--cut_to=half"], ["'half' is no number; give some, such as --cut_to=0.5,0"]),
    ([*SENSITIVITY, "--cut_to=2"], ["--cut_to=2 is outside [0, 1]"]),
    ([*SENSITIVITY, "--cut_to="], ["give 1 to 8"]),
    ([*SENSITIVITY, "--sequences=0"], ["at least 1, or -1 for all"]),
    ([*SENSITIVITY, "--budget=half"], ["--budget=half must be a number"]),
    ([*SWEEP], ["--workdir is missing; give --workdir=WORKDIR"]),
    ([*SWEEP, "--workdir=x", "--jobs=two"], ["--jobs=two must be a whole number"]),
    ([*SWEEP, "--workdir=x", "--jobs=0"], ["--jobs=0", "positive"]),
    ([*SWEEP, "--workdir=x", "--only=best"], ["--only=best", "--list prints them"]),
    ([*SWEEP, "--workdir=x", "--config.compared=seed"], ["not in the grid; it has model.sync"]),
    ([*SWEEP, "--workdir=x", "--config.train.steps=9"], ["nearest is config.run.train.steps"]),
    ([*SWEEP, "--workdir=x", "--config.run.train.steps=0"], ["train.steps=0 must be at least 1"]),
    ([*SWEEP, "--workdir=/proc/x"], ["--workdir=/proc/x: "]),
    ([SWEEP[0], "--workdir=x"], ["--config is missing", "configs/sweep.py"]),
    ([SWEEP[0], TINY, "--workdir=x"], ["as configs/sweep.py does; train.py takes"]),
    ([*STEP_TIME], ["--chip is missing"]),
    ([*STEP_TIME, "--chip=v5q"], ["nearest is v5p"]),
    ([*STEP_TIME, "--chip=v5p", "--p=2"], ["--p=2 is outside [0, 1]"]),
    ([*STEP_TIME, "--chip=v5p", "--p=all"], ["--p=all must be a number"]),
    ([*STEP_TIME, "--chip=v5p", "--efficiency=2"], ["--efficiency=2 is outside (0, 1]"]),
    ([*STEP_TIME, "--chip=v5p", "--devices=0"], ["--devices=0 must be at least 1"]),
    (
        [*STEP_TIME, "--chip=v5p", "--devices=12", "--config.mesh.model=8"],
        ["12 devices", "mesh.model=8"],
    ),
    ([*STEP_TIME, "--chip=v5p", "--flops=1e12"], ["--memory_rate"]),
    ([word for word in STEP_TIME if word != "--devices=8"] + ["--chip=v5p"], ["devices"]),
    ([*STEP_TIME, "--topology=pod"], ["write it as in v5e:2x4"]),
    (
        [*STEP_TIME, "--chip=v5p", "--config.model.vocab_size=-1"],
        ["give it, such as --config.model.vocab_size=32000"],
    ),
    (
        [*STEP_TIME, "--chip=v5p", "--config.compute.dtype=float32"],
        ["give --config.compute.dtype=bfloat16"],
    ),
    ([*STEP_TIME, "--chip=v5p", "--chips=v6e"], ["the nearest is --chip"]),
    ([*TOKENIZER, "--output=x.txt"], ["must end in .json"]),
    ([*TOKENIZER, "--output="], ["--output is empty; give a path"]),
    ([*TOKENIZER, "--vocab_size=3"], ["vocab_size=3 must be at least 258"]),
    ([*TOKENIZER, "--vocab_size=few"], ["--vocab_size=few must be a whole number"]),
    ([*TOKENIZER, "--output=/nope/x.json"], ["/nope/x.json cannot be written"]),
    ([TOKENIZER[0]], ["--config is missing; give a file, such as --config=configs/tiny.py"]),
]


@pytest.mark.parametrize(("command", "said"), USES, ids=lambda value: " ".join(value)[-60:])
def test_wrong_use(tmp_path, command, said):
    assert_refused(run_here(command, tmp_path), *said)
    assert list(tmp_path.iterdir()) == []
