"""The training loop: what happens at which step."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import tqdm

from caat_jax import activity
from caat_jax.checkpoints import workdir as workdir_lib
from caat_jax.checkpoints.checkpoints import Checkpoints, stored_config
from caat_jax.checkpoints.trained import TrainedModel
from caat_jax.config.resolve import resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.data import carried_tokenizer
from caat_jax.data.loader import TrainBatches, train_batches
from caat_jax.data.token_cache import TokenCache, TokenSequences, open_cache
from caat_jax.devices import memory, processes, sharding
from caat_jax.devices.dispatch import one_program_at_a_time
from caat_jax.devices.processes import StopRequest
from caat_jax.errors import Diverged, Interrupted
from caat_jax.model import attention
from caat_jax.training import teacher as teachers
from caat_jax.training.metrics import MetricsWriter, Throughput, model_flops_per_token, peak_flops
from caat_jax.training.optimizer import learning_rate
from caat_jax.training.step import Programs, TrainState
from caat_jax.training.validation import validation_loss


def train(config: Config, workdir: Path) -> tuple[int, float]:
    """Trains to `train.steps`, from the workdir's newest undamaged checkpoint where there is one.

    Every process of the run calls it; the first writes the metrics.

    Returns:
      The steps done and the validation loss then, in nats a token.

    Raises:
      InputError: something given cannot work (nothing is written to the workdir then), or a
        checkpoint could not be written.
      Diverged: more than `train.skipped_updates_allowed` updates in a row were skipped.
      Interrupted: by SIGTERM or Ctrl-C, after a checkpoint; or another process is gone.
    """
    config.data.check_own_text()
    workdir_lib.check_writable(workdir)
    tokenizer = carried_tokenizer.load_for_training(config.data.tokenizer, workdir)
    # Before devices are asked for, which waits for all processes.
    processes.check_same({f"the tokeniser {config.data.tokenizer}": tokenizer.fingerprint})
    config = config.with_vocabulary(tokenizer.size)
    mesh = sharding.create_mesh(resolve_mesh(config, len(jax.devices())))
    attention_kernel = attention.choose(config.model, config.compute, mesh.devices.flat[0].platform)
    memory.check_training(config, mesh, attention_kernel)
    teacher = teachers.load(config, mesh, tokenizer)
    # Of any stage of the schedule: states have the same layout in all.
    programs = Programs(config, mesh, teacher and teacher.config.model)
    to_keep = config.train.checkpoints_to_keep
    with workdir_lib.sole_run(workdir), Checkpoints(workdir, to_keep=to_keep) as checkpoints:
        newest = checkpoints.resume_step()
        if newest is not None:
            checkpoints.check_architecture(newest, config.at_step(newest))
        begun_with = None if newest is None else checkpoints.batches_state(newest).get("tokens")
        cache = open_cache(config.data, tokenizer, begun_with=begun_with)
        _check_same_corpus(cache)
        batches = train_batches(
            cache.train,
            global_batch=config.train.global_batch,
            seed=config.seed,
            sharding=programs.batch_sharding,
        )
        if newest is None:
            state = programs.initial_state()
        else:
            with activity.shown(f"restoring step {newest}"):
                state, data_state = checkpoints.restore(newest, programs.state_shapes)
            batches.set_state(data_state)
            _report_another_decay(stored_config(checkpoints.folder, newest), config, newest)
        if processes.is_first():
            carried_tokenizer.carry(config.data.tokenizer, workdir)
        done = newest or 0
        with _metrics_writer(workdir, newest) as writer:
            if done < config.train.steps:
                if processes.is_first():
                    print(_description(programs, done), file=sys.stderr)
                return config.train.steps, _loop(
                    programs, state, done, batches, cache.validation, checkpoints, writer, teacher
                )
        return done, validation_loss(programs.at_step(done), state.parameters, cache.validation)


def _check_same_corpus(cache: TokenCache) -> None:
    processes.check_same(
        {
            "the corpus in tokens": cache.train.fingerprint,
            "the number of training sequences": len(cache.train),
            "the number of validation sequences": len(cache.validation),
        }
    )


def _report_another_decay(stored: Config, config: Config, done: int) -> None:
    """Says so where the learning rate will not go on as it was planned."""
    before, now = stored.optimizer, config.optimizer
    if done and before.decay_steps != now.decay_steps and processes.is_first():
        rates = [float(learning_rate(optimizer)(done)) for optimizer in (before, now)]
        print(
            f"optimizer.decay_steps was {before.decay_steps} and is now {now.decay_steps}: at step"
            f" {done} the learning rate changes from {rates[0]:.3g} to {rates[1]:.3g};"
            f" --config.optimizer.decay_steps={before.decay_steps} keeps its course",
            file=sys.stderr,
        )


def _loop(
    programs: Programs,
    state: TrainState,
    done: int,
    batches: TrainBatches,
    validation: TokenSequences,
    checkpoints: Checkpoints,
    writer: MetricsWriter | None,
    teacher: TrainedModel | None,
) -> float:
    """Does the steps after `done`, each with the programs of its stage of `train.sync_schedule`.

    Returns the last validation loss.
    """
    config, train = programs.config, programs.config.train
    stage = programs.at_step(done + 1)
    taught_by = (teacher.parameters,) if teacher else ()
    train_step = _compiled(stage)
    # CPU processes wait 30 seconds for each other's connections, and may compile for longer.
    processes.check_same({"the step to resume from": done})
    with StopRequest() as stop_request, _Log(config, writer, done) as log:
        for step in range(done + 1, train.steps + 1):
            if stage.config != config.at_step(step):  # a stage of the schedule is over
                with log.pause(step - 1):
                    stage = programs.at_step(step)
                    train_step = _compiled(stage)
            batch = next(batches)
            profiled = step == train.profile_step and writer is not None
            with _profiled(writer.workdir if profiled else None), jax.transfer_guard("disallow"):
                state, values = train_step(state, batch, *taught_by)
                if profiled or one_program_at_a_time():  # a trace shall hold the whole step
                    jax.block_until_ready(values)
            log.step(step, values)
            checkpoints.check()
            last = step == train.steps
            stop = stop_request.reached() and not last
            evaluate = last or step % train.eval_every == 0
            save = last or stop or step % train.checkpoint_every == 0
            if evaluate or save:
                with log.pause(step):
                    if evaluate:
                        with activity.shown("evaluating"):
                            loss = validation_loss(stage, state.parameters, validation)
                        log.evaluation(step, loss)
                    if save:
                        if writer:
                            writer.synchronise()
                        checkpoints.save(state, step, stage.config, batches.get_state())
            if stop:
                with activity.shown("saving"):
                    checkpoints.wait()
                raise Interrupted(f"stopped after step {step}, saved; the same command resumes")
    return loss


def _compiled(programs: Programs) -> Callable[..., Any]:
    with activity.shown("compiling the training step"):
        return programs.compile_train_step()


def _metrics_writer(
    workdir: Path, resume_step: int | None
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """That of the run's first process; the others have none."""
    if processes.is_first():
        return MetricsWriter(workdir, resume_step)
    return contextlib.nullcontext()


def _description(programs: Programs, done: int) -> str:
    """For people: what is trained, on what, and after which step; the text comes first."""
    config, mesh = programs.config, programs.mesh
    devices = mesh.devices.ravel()
    several = jax.process_count() > 1
    place = f"{jax.process_count()} processes" if several else "one process"
    stages = [
        f"{config.at_step(stage.until).model.describe_sync_factors()} to step {stage.until}, then "
        for stage in config.train.sync_schedule
        if stage.until > done
    ]
    return (
        f"training on {config.data.describe()}\n"
        f"{programs.blueprint.size / 1e6:,.1f} M parameters; S={config.model.tp_shards},"
        f" p={''.join(stages)}{config.model.describe_sync_factors()}\n"
        f"{len(devices)} {devices[0].device_kind} devices of {place},"
        f" {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())};"
        f" {programs.blueprint.attention} attention\n"
        f"{f'resuming after step {done}; ' if done else ''}compiling the training step"
    )


class _Log:
    """Metrics to the writer, where there is one, and the progress bar, one step late.

    Reading a value waits for the step that computes it; by then the next is already dispatched,
    so that an accelerator never waits for the host.
    """

    def __init__(self, config: Config, writer: MetricsWriter | None, done: int):
        devices = jax.devices()
        length = config.data.sequence_length
        peak = peak_flops(devices[0].device_kind, config.compute.dtype)
        self._train = config.train
        self._writer = writer
        self._throughput = Throughput(
            done,
            tokens_per_step=config.train.global_batch * length,
            flops_per_token=model_flops_per_token(config.model, length),
            peak_flops=peak and peak * len(devices),
        )
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._bar = tqdm.tqdm(
            total=config.train.steps,
            initial=done,
            bar_format=activity.BAR_FORMAT,
            dynamic_ncols=True,
            # No bar where the output is no terminal.
            disable=None if writer else True,
        )

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        try:
            if exception is None:
                self._read_pending()
        finally:
            self._bar.close()

    def step(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's metrics.

        Raises:
          Diverged: after the step before this one, or this one.
        """
        self._read_pending()
        self._bar.update()
        self._pending = (step, values)
        if one_program_at_a_time():  # then the step is done, and nothing is gained by delay
            self._read_pending()

    def evaluation(self, step: int, loss: float) -> None:
        if self._writer is None:
            return
        self._writer.write(step, {"eval/loss": loss})
        tqdm.tqdm.write(f"step {step}: validation loss {loss:.4f} nats per token", file=sys.stderr)

    @contextlib.contextmanager
    def pause(self, step: int) -> Iterator[None]:
        """Leaves what is inside out of the step time; it comes after all metrics up to `step`."""
        self._read_pending()
        yield
        self._throughput.restart(step)

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        skipped = int(values.pop("train/skipped_in_a_row"))
        allowed = self._train.skipped_updates_allowed
        logged = step % self._train.log_every == 0 or step == self._train.steps
        if self._writer and (logged or skipped > allowed):
            self._write(step, values)
        if skipped > allowed:
            raise Diverged(
                f"the loss or its gradient was not finite at {skipped} steps in a row, the last"
                f" being step {step}, with train.skipped_updates_allowed={allowed}; the checkpoints"
                " before are whole: try a smaller optimizer.peak_learning_rate or another seed"
            )

    def _write(self, step: int, values: dict[str, jax.Array]) -> None:
        metrics: dict[str, Any] = {name: float(value) for name, value in values.items()}
        metrics |= self._throughput.measure(step)
        self._writer.write(step, metrics)
        self._bar.set_postfix_str(
            f"loss {metrics['train/loss']:.3f}, {metrics['tokens_per_second']:,.0f} tok/s"
        )


@contextlib.contextmanager
def _profiled(workdir: Path | None) -> Iterator[None]:
    """Writes a `jax.profiler` trace of what is inside to `WORKDIR/profile`, if there is one."""
    with jax.profiler.trace(str(workdir / "profile")) if workdir else contextlib.nullcontext():
        yield
