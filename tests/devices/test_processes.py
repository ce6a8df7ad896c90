"""Runs of several processes on this machine, with real signals; how each ends."""

import functools
import os
import random
import re
import signal
import subprocess

import pytest
import tokenizers
import yaml

from caat_jax.errors import Diverged, InputError
from tests import runs
from tests.command_line import (
    REPOSITORY,
    TINY,
    assert_refused,
    run_forked,
    run_here,
    start_forked,
)
from tests.runs import STEPS, Run, processes_flags, start_processes

COMPARED = ("train/loss", "train/grad_norm", "eval/loss")
GAVE_UP = 4  # launch/attempt.sh's
ENDLESS = {"train.steps": 10_000, "optimizer.decay_steps": 10_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The workdir of one process with eight devices, model = 8."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run = Run(workdir, corpus)
    assert run.wait() == 0, run.output
    return workdir


def assert_same(workdir, expected, relative, first=1):
    """The metrics from step `first` on are the expected ones; none is missing."""
    for name in COMPARED:
        values = {s: v for s, v in runs.series(expected, name).items() if s >= first}
        found = {s: v for s, v in runs.series(workdir, name).items() if s >= first}
        assert found == pytest.approx(values, rel=relative, abs=0), name


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (2, {}),  # model = 4: a layer's all-reduce goes through both processes
        # model = 4 in two pairs of processes
        pytest.param(4, {"mesh.data": 2}, marks=pytest.mark.slow),
        # model = 2 within each process
        pytest.param(2, {"mesh.fsdp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_are_those_of_one_process(corpus, alone, tmp_path, number, fields):
    processes = start_processes(number, tmp_path / "run", corpus | fields)
    assert [run.wait() for run in processes] == [0] * number, processes[0].output
    assert_same(tmp_path / "run", alone, relative=1e-5)
    # Only the first process reports.
    assert f"{STEPS} steps done" in processes[0].output
    assert [run.said() for run in processes[1:]] == [[]] * (number - 1)


@pytest.mark.parametrize(
    "mesh",
    [{"mesh.model": 2}, pytest.param({"mesh.fsdp": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_sums_of_two_are_the_same_bits(corpus, tmp_path, mesh):
    """Of more than two addends, gloo sums in another order than the devices of one process."""
    one = Run(tmp_path / "one", corpus | mesh, devices=2)
    assert one.wait() == 0, one.output
    two = start_processes(2, tmp_path / "two", corpus | mesh, devices=1)
    assert [run.wait() for run in two] == [0, 0], two[0].output
    assert_same(tmp_path / "two", tmp_path / "one", relative=0)


def test_sigterm_to_one_stops_all_and_fewer_go_on(corpus, alone, tmp_path):
    """And the next one, a single process on another mesh, continues the same losses."""
    workdir = tmp_path / "run"
    # In the middle; then, of what is resumed, before its first step.
    for reached in (lambda _: runs.last_step(workdir) >= 3, lambda run: "compiling" in run.output):
        processes = start_processes(2, workdir, corpus | {"train.checkpoint_every": 1000})
        processes[0].wait_until(functools.partial(reached, processes[0]))
        processes[1].signal(signal.SIGTERM)
        assert [run.wait() for run in processes] == [75, 75], processes[0].output
        step = runs.checkpoint_steps(workdir)[-1]
        assert runs.last_step(workdir) == step
        for run in processes:
            assert f"stopped after step {step}, saved" in run.said()[-1]
    run = Run(workdir, corpus | {"mesh.data": 2, "mesh.fsdp": 2})
    assert run.wait() == 0, run.output
    assert f"resuming after step {step};" in run.output
    assert_same(workdir, alone, relative=1e-5)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("seed", (0, 1)),
        pytest.param("optimizer.peak_learning_rate", (0.01, 0.02), marks=pytest.mark.slow),
        pytest.param("model.sync_factor", (0.5, 0.25), marks=pytest.mark.slow),
        pytest.param("train.steps", (20, 30), marks=pytest.mark.slow),
        pytest.param("train.global_batch", (8, 16), marks=pytest.mark.slow),
    ],
)
def test_processes_of_different_commands_are_refused(corpus, tmp_path, field, values):
    workdir = tmp_path / "run"
    processes = [
        Run(workdir, corpus | {field: value}, *flags, devices=1)
        for value, flags in zip(values, processes_flags(2), strict=True)
    ]
    assert [run.wait() for run in processes] == [2, 2], processes[0].output
    said = f"error: --config.{field} is {values[0]} in process 0 and {values[1]} in process 1;"
    assert [said in run.said()[-1] for run in processes] == [True, True], processes[1].output
    assert not workdir.exists()


def test_processes_with_different_documents_are_refused(tmp_path):
    """The same command, on machines whose files differ."""
    homes = [tmp_path / name for name in ("home0", "home1")]
    for number, home in enumerate(homes):
        home.mkdir()
        runs.write_texts(home / "texts", [f"document {n} of {number} " * 20 for n in range(12)])
    fields = {"data.files": "~/texts/*.txt", "data.cache_dir": "~/cache"}
    processes = [
        Run(tmp_path / "run", fields, *flags, devices=1, environment={"HOME": str(home)})
        for home, flags in zip(homes, processes_flags(2), strict=True)
    ]
    assert [run.wait() for run in processes] == [2, 2], processes[0].output
    for run in processes:
        assert "error: the corpus in tokens is '" in run.said()[-1], run.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_one_process_cannot_do_ends_all(corpus, tmp_path, failing):
    """Here, reading a tokeniser that is not on its machine."""
    homes = [tmp_path / name for name in ("home0", "home1")]
    for number, home in enumerate(homes):
        home.mkdir()
        if number != failing:
            words = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, "?")
            tokenizer = tokenizers.Tokenizer(words)
            tokenizer.add_special_tokens(["<s>", "</s>"])
            tokenizer.save(str(home / "letters.json"))
    fields = corpus | {"data.tokenizer": "~/letters.json"}
    processes = [
        Run(tmp_path / "run", fields, *flags, devices=1, environment={"HOME": str(home)})
        for home, flags in zip(homes, processes_flags(2), strict=True)
    ]
    assert [run.wait() for run in processes] == [2, 2], processes[1 - failing].output
    for run in processes:
        assert "data.tokenizer=~/letters.json cannot be read" in run.said()[-1], run.output


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_others(corpus, tmp_path, killed):
    workdir = tmp_path / "run"
    timeout = {"caat_jax.devices.processes.TIMEOUT_SECONDS": 10}
    processes = start_processes(2, workdir, corpus | ENDLESS, constants=timeout)
    processes[0].wait_until(lambda: bool(runs.checkpoint_steps(workdir)))
    processes[killed].signal(signal.SIGKILL)
    other = processes[1 - killed]
    code = other.wait(seconds=90)
    # The collective fails or, where JAX's runtime was faster to notice, that aborts the process.
    assert code in (75, -signal.SIGABRT), other.output
    if code == 75:
        assert "another process of the run is gone" in other.said()[-1]
    assert runs.checkpoint_steps(workdir)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_before_the_first_step(corpus, tmp_path, number):
    run = Run(tmp_path / "run", corpus | ENDLESS)
    run.wait_until(lambda: "compiling" in run.output)
    run.signal(number)
    assert run.wait() == 75
    # The signal may come between a line and its end.
    assert "stopped by" in run.said()[-1] and "Traceback" not in run.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.", 2),
        ("UNAVAILABLE: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:1", 75),
        ("INTERNAL: Failed to verify the module", 1),
    ],
)
def test_what_fails_on_a_device_of_several_processes(tmp_path, error, code):
    """2: this process's own fault, as it would be again; 75: another's; 1: neither is known."""
    script = f"""
import jax
from caat_jax import command_line
from caat_jax.devices import processes

processes.number = lambda: 2

def main():
    raise jax.errors.JaxRuntimeError({error!r})

command_line.run(main)
"""
    (tmp_path / "fail.py").write_text(script)
    done = run_forked([tmp_path / "fail.py"], tmp_path)
    assert done[0] == code and ("Traceback" in done[2]) == (code == 1), done


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_L"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_MCA_orte_hnp_uri"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "did not find each other"),
    ],
)
def test_a_launchers_variables_half_there(corpus, tmp_path, variables, said):
    run = Run(tmp_path / "run", corpus, environment=variables)
    assert run.wait() == 2
    assert said in run.said()[-1] and "--num_processes=1" in run.said()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stop_request(corpus, tmp_path, number):
    workdir = tmp_path / "run"
    run = Run(workdir, corpus | ENDLESS | {"train.checkpoint_every": 5000})
    run.wait_until(lambda: runs.last_step(workdir) >= 2)
    run.signal(number)
    assert run.wait() == 75
    (step,) = runs.checkpoint_steps(workdir)
    assert runs.last_step(workdir) == step
    assert run.said()[-1] == f"stopped after step {step}, saved; the same command resumes"


def test_second_run_in_a_workdir_is_refused(corpus, tmp_path):
    workdir = tmp_path / "run"
    first = Run(workdir, corpus | ENDLESS)
    first.wait_until(lambda: runs.has_metrics(workdir))
    second = Run(workdir, corpus | ENDLESS)
    assert second.wait() == 2
    assert [line for line in second.said() if "another run is training there" not in line] == []
    before = runs.last_step(workdir)
    first.wait_until(lambda: runs.last_step(workdir) > before)
    first.signal(signal.SIGKILL)
    first.wait()
    third = Run(workdir, corpus | ENDLESS)
    third.wait_until(lambda: "compiling" in third.output)
    third.signal(signal.SIGKILL)
    third.wait()
    assert "another run" not in third.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_processes=2"], "--coordinator_address, --process_id missing"),
        (["--process_id=0"], "--coordinator_address, --num_processes missing"),
        (
            ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be below --num_processes=2",
        ),
        (["--num_processes=0"], "num_processes=0"),
    ],
    ids=str,
)
def test_bad_flags(tmp_path, flags, said):
    assert_refused(
        run_here(["train.py", TINY, f"--workdir={tmp_path}/run", *flags], tmp_path), said
    )
    assert not (tmp_path / "run").exists()


def test_generation_and_evaluation_are_those_of_one_process(corpus, tmp_path):
    """Of a model whose layers then lie on both."""
    workdir = tmp_path / "run"
    run = Run(workdir, corpus, devices=4)
    assert run.wait() == 0, run.output
    prompts = ("--prompt=the shard", "--prompt=keeps", "--max_new_tokens=20")
    commands = {"generate.py": prompts, "eval.py": ()}
    for script, flags in commands.items():
        said = []
        for number in (1, 2):
            flags_of_each = processes_flags(number)
            outputs = [
                [tmp_path / f"{script}.{number}.{process}.{stream}" for stream in ("out", "err")]
                for process in range(number)
            ]
            started = [
                start_forked([script, f"--workdir={workdir}", *flags, *each], tmp_path, files)
                for each, files in zip(flags_of_each, outputs, strict=True)
            ]
            for process in started:
                process.join(240)
            assert [process.exitcode for process in started] == [0] * number
            stdout = [files[0].read_text() for files in outputs]
            assert stdout[1:] == [""] * (number - 1)
            said.append(stdout[0])
        if script == "generate.py":
            assert said[0] == said[1] and len(said[0]) > 60
        else:
            losses = [float(re.search(r"loss +(\S+)", stdout)[1]) for stdout in said]
            assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def slurm(process, job):
    return {
        "SLURM_JOB_ID": f"{job}",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": f"{process}",
        "SLURM_LOCALID": f"{process}",
    }


def open_mpi(process, job):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": f"{process}",
        "OMPI_COMM_WORLD_LOCAL_RANK": f"{process}",
    }


@pytest.mark.parametrize("launcher", [slurm, pytest.param(open_mpi, marks=pytest.mark.slow)])
def test_processes_find_each_other_by_the_launchers_variables(corpus, tmp_path, launcher):
    fields, job = corpus | {"train.steps": 1}, random.randrange(4096)  # it chooses the port
    processes = [
        Run(tmp_path / "run", fields, devices=2, environment=launcher(process, job))
        for process in (0, 1)
    ]
    assert [run.wait() for run in processes] == [0, 0], processes[0].output
    assert "4 cpu devices of 2 processes" in processes[0].output


def test_one_process_alone(corpus, tmp_path):
    """Whatever the launcher says."""
    fields = corpus | {"train.steps": 1}
    run = Run(tmp_path / "run", fields, "--num_processes=1", environment=slurm(0, 1))
    assert run.wait() == 0, run.output


@pytest.mark.slow
def test_the_command_of_the_docs(tmp_path):
    """docs/scale_out.md shows how to start two processes on one machine."""
    text = (REPOSITORY / "docs/scale_out.md").read_text()
    (script,) = re.findall(r"```\n(for process in 0 1.*?)```", text, re.DOTALL)
    small = runs.SMALL | {
        "train.steps": 5,
        "train.eval_sequences": 8,
        "data.cache_dir": tmp_path / "cache",
    }
    flags = " ".join(f"--config.{name}={value}" for name, value in small.items())
    for said, run in (
        ("python train.py", f"{runs.PYTHON} train.py"),
        ("--workdir=runs/two", f"--workdir={tmp_path}/run {flags}"),
    ):
        assert script.count(said) == 1
        script = script.replace(said, run)
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "2 processes" in done.stderr and "5 steps done" in done.stdout, done.stderr


def attempt(workdir, command, environment=None):
    """The exit code of launch/attempt.sh."""
    arguments = ["sh", "launch/attempt.sh", workdir, "sh", "-c", command]
    environment = os.environ | (environment or {})
    done = subprocess.run(arguments, cwd=REPOSITORY, env=environment, check=False)
    return done.returncode


def test_attempts_in_vain_end(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert [attempt(tmp_path, "exit 75") for _ in range(5)] == [75, 75, 75, GAVE_UP, 75]
    for step in (90, 100):  # a new checkpoint: progress
        (checkpoints / str(step)).mkdir(parents=True)
        assert [attempt(tmp_path, "exit 134") for _ in range(3)] == [134] * 3
    (checkpoints / "100.saving").mkdir()
    assert attempt(tmp_path, "kill -KILL $$") == GAVE_UP
    for code in (0, 2, 3):
        assert [attempt(tmp_path, f"exit {code}") for _ in range(5)] == [code] * 5
    # Only the first pod counts.
    assert [attempt(tmp_path, "exit 1", {"JOB_COMPLETION_INDEX": "1"}) for _ in range(9)] == [1] * 9


def test_an_attempt_passes_on_a_signal(tmp_path):
    script = 'trap "exit 75" TERM; echo ready; while :; do sleep 0.05; done'
    arguments = ["sh", "launch/attempt.sh", tmp_path, "sh", "-c", script]
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.wait(10) == 75
    process.stdout.close()


def test_the_kubernetes_manifest():
    service, job = yaml.safe_load_all((REPOSITORY / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"][-1]
    name = service["metadata"]["name"]
    assert pod["subdomain"] == name and job["metadata"]["name"] == name
    assert service["spec"]["selector"] == {"job-name": name}
    assert f"--coordinator_address={name}-0.{name}:" in command
    number = job["spec"]["completions"]
    assert number == job["spec"]["parallelism"] and f"--num_processes={number} " in command
    final = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert final["containerName"] == container["name"]
    assert final["values"] == [InputError.exit_code, Diverged.exit_code, GAVE_UP]
