"""Workers of `links.py`: one process on each host for all variants of one kind of system.

python -m benchmarks.link_workers ours '["FACTORS:WIRE", …]' HOSTS HOST PORT SIZES
python -m benchmarks.link_workers dense '["replicated", "sequence"]' HOSTS HOST PORT SIZES
python -m benchmarks.link_workers torch '["-"]' HOSTS HOST PORT SIZES

FACTORS is a `model.sync_factor` or a `model.sync_factor_per_layer`.  Variants share processes, and
therefore connections, so that they differ only in what they compute and send.  PORT must be free on
host0; SIZES is a `Sizes` as JSON.  Once a worker has compiled, it
describes its variants in a line of JSON.  Then it reads requests, [variant, workload, "time" or
"profile"], runs the workload together with the other hosts' workers, and answers with the
milliseconds of each of its parts, or with what `link_profile` measured.  The torch peer needs
torch, transformers and accelerate, but none of this project's dependencies.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import link_profile
from benchmarks.link_sizes import Generation, Sizes, config_of


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    hosts: int
    host: int
    port: int  # of the coordinator, on host0


# A workload beside those that are reported: what the delay of the links is by itself.
HOP = "hop"
# What a worker runs when asked; returns the milliseconds of the parts, such as {"train": 812.5}.
Workloads = dict[str, Callable[[], dict[str, float]]]


def build_ours(variant: str, place: Place, sizes: Sizes) -> tuple[Workloads, dict]:
    """This project's training step and `Generator`, S = M = the number of hosts."""
    import jax

    from caat_jax.communication import traced_programs
    from caat_jax.inference.generator import Generator

    factors, wire = variant.split(":")
    if wire == "bfloat16":
        _send_bfloat16()
    programs = _programs(factors, place, sizes, wire)
    workloads: Workloads = {HOP: _hop(programs.mesh)}
    traces = {}
    if sizes.train_batch:
        batch = _batch(sizes, programs.batch_sharding)
        step = _train_step(programs.train_step, programs.initial_state(), batch)
        traces["train"] = programs.trace_train_step()
        workloads["train"] = lambda: {"train": _milliseconds(step)}
    generator = Generator(programs.config, programs.mesh, _parameters(place, sizes))
    inference = generator.programs
    for case in sizes.generations:
        prompts = _prompts(sizes, case).tolist()
        stream = functools.partial(generator.stream, prompts, max_new_tokens=case.new_tokens)
        workloads[f"generate {case.prompts}"] = functools.partial(_generation, stream, case)
        cache = case.prompt_length + case.new_tokens
        traces[f"prefill {case.prompts}"] = inference.trace_prefill(case.batch, case.prompt_length)
        traces[f"decode {case.prompts}"] = inference.trace_decode(case.batch, cache)
    sent = {name: traced_programs.count(trace.jaxpr).wire_bytes for name, trace in traces.items()}
    return workloads, {"versions": f"jax {jax.__version__}", "wire_bytes": sent}


@functools.cache
def _parameters(place: Place, sizes: Sizes) -> Any:
    """Of a model of these sizes, whatever its factors."""
    return _programs("1.0", place, sizes).initial_state().parameters


@functools.cache
def _hop(mesh: Any) -> Callable[[], dict[str, float]]:
    """A workload: the milliseconds of one of the 2 (M - 1) hops of an all-reduce of few numbers."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    hosts, rounds = mesh.shape["model"], 50

    def reduce(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lax.pcast(lax.psum(x / hosts, "model"), "model", to="varying"), None

    run = jax.jit(
        jax.shard_map(
            lambda x: lax.scan(reduce, x, length=rounds)[0],
            mesh=mesh,
            in_specs=P("model"),
            out_specs=P("model"),
        )
    )
    # Gloo splits an array into two segments a host, and leaves out what would be empty.
    numbers = jnp.ones(16 * hosts * hosts)
    hops = rounds * 2 * (hosts - 1)
    return lambda: {HOP: _milliseconds(lambda: jax.block_until_ready(run(numbers))) / hops}


def build_dense(residual: str, place: Place, sizes: Sizes) -> tuple[Workloads, dict]:
    """The same model at p = 1 in plain JAX: weights split over `model`, the rest automatic.

    The residual stream is whole on each host ("replicated") or split by position ("sequence").
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from benchmarks import dense_baseline
    from caat_jax.training import optimizer as optimizer_lib

    programs = _programs("1.0", place, sizes)
    mesh, model = programs.mesh, programs.config.model

    def on_mesh(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, P(*axes))

    stream = on_mesh(None, "model" if residual == "sequence" else None, None)
    layer = {
        "attention": {
            "norm": on_mesh(),
            **dict.fromkeys(("query", "key", "value"), on_mesh(None, "model", None)),
            "output": on_mesh("model", None, None),
        },
        "mlp": {
            "norm": on_mesh(),
            **dict.fromkeys(("gate", "up"), on_mesh(None, "model")),
            "down": on_mesh("model", None),
        },
    }
    shardings = {
        "embedding": on_mesh(None, "model"),
        "layers": [layer] * sizes.layers,
        "final_norm": on_mesh(),
        "head": on_mesh(None, "model"),
    }
    parameters = dense_baseline.from_stacked(programs.initial_state().parameters)
    parameters = jax.jit(lambda tree: tree, out_shardings=shardings)(parameters)
    optimizer = optimizer_lib.create(
        programs.config.optimizer, jax.tree.map(lambda w: ("axis",) * w.ndim, parameters)
    )
    settings = {
        "rope_base": model.rope_base,
        "norm_epsilon": model.norm_epsilon,
        "constrain": lambda x: jax.lax.with_sharding_constraint(x, stream),
    }
    train = dense_baseline.make_train_step(optimizer, **settings)
    state = parameters, jax.jit(optimizer.init)(parameters)

    def train_step(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        *state, loss = train(*state, batch)
        return state, loss

    # The training state is donated, and its parameters with it.
    kept = jax.tree.map(jnp.copy, parameters)
    forward = jax.jit(
        lambda weights, tokens: dense_baseline.forward(
            weights, tokens, last_only=True, **settings
        ).argmax(-1)
    )
    workloads: Workloads = {}
    if sizes.train_batch:
        step = _train_step(train_step, state, _batch(sizes, programs.batch_sharding))
        workloads["train"] = lambda: {"train": _milliseconds(step)}
    for case in sizes.generations:
        prompts = _prompts(sizes, case)
        workloads[f"generate {case.prompts}"] = lambda prompts=prompts, case=case: {
            f"prefill {case.prompts}": _milliseconds(
                lambda: jax.block_until_ready(forward(kept, prompts))
            )
        }
    return workloads, {"versions": f"jax {jax.__version__}"}


def build_torch(_: str, place: Place, sizes: Sizes) -> tuple[Workloads, dict]:
    """A Llama of `transformers` with tp_plan="auto" and a dynamic cache: generation only."""
    import tempfile

    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=sizes.embed_dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocab_size,
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Before there is a process group, in which only the first process would save.
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        os.environ.update(
            MASTER_ADDR="host0",
            MASTER_PORT=f"{place.port}",
            RANK=f"{place.host}",
            LOCAL_RANK=f"{place.host}",
            WORLD_SIZE=f"{place.hosts}",
        )
        torch.distributed.init_process_group("gloo")
        model = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()

    @torch.inference_mode()
    def stream(prompts: torch.Tensor, new_tokens: int) -> Any:
        result = model(prompts, use_cache=True, logits_to_keep=1)
        for _ in range(new_tokens):
            tokens = result.logits[:, -1:].argmax(-1)
            yield int(tokens[0])
            result = model(tokens, past_key_values=result.past_key_values, use_cache=True)

    workloads: Workloads = {}
    for case in sizes.generations:
        prompts = torch.from_numpy(_prompts(sizes, case)).long()
        workloads[f"generate {case.prompts}"] = functools.partial(
            _generation, functools.partial(stream, prompts, case.new_tokens), case
        )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return workloads, {"versions": versions}


def _join(place: Place) -> None:
    """Connects to JAX on the other hosts."""
    from caat_jax.devices import processes

    processes.join(
        coordinator_address=f"host0:{place.port}", num_processes=place.hosts, process_id=place.host
    )


def _send_bfloat16() -> None:
    """Makes reductions in bfloat16 send 2 bytes a number, which XLA for CPUs widens to 4.

    In the two phases that types of 8 bits have: parts to their owners, sums to everybody.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    from caat_jax.model import reductions

    as_it_is = reductions._sum_over_model

    def sent(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)

    def received(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)

    def sum_over_model(partial: jax.Array, dtype: jnp.dtype, wire: reductions.Wire) -> jax.Array:
        if dtype != jnp.bfloat16:
            return as_it_is(partial, dtype, wire)
        parts = partial.reshape(lax.axis_size("model"), -1)
        part = received(lax.all_to_all(sent(parts), "model", 0, 0)).sum(axis=0)
        total = received(lax.all_gather(sent(part), "model"))
        return total.reshape(partial.shape).astype(partial.dtype)

    reductions._sum_over_model = sum_over_model


def _programs(factors: str, place: Place, sizes: Sizes, wire: str = "float32") -> Any:
    """The programs of that configuration."""
    from caat_jax.devices import sharding
    from caat_jax.training.step import Programs

    config = config_of(factors, place.hosts, sizes, wire)
    return Programs(config, sharding.create_mesh(config.mesh))


def _train_step(step: Callable, state: Any, batch: Any) -> Callable[[], None]:
    """A function without arguments that runs `step(state, batch)` -> (next state, values)."""
    import jax

    def one() -> None:
        nonlocal state
        state, values = step(state, batch)
        jax.block_until_ready(values)

    return one


def _batch(sizes: Sizes, sharding: Any) -> Any:
    import jax

    shape = sizes.train_batch, sizes.train_length + 1
    rows = np.random.default_rng(0).integers(sizes.vocab_size, size=shape, dtype=np.int32)
    return jax.make_array_from_callback(shape, sharding, lambda index: rows[index])


def _prompts(sizes: Sizes, case: Generation) -> np.ndarray:
    shape = case.batch, case.prompt_length
    return np.random.default_rng(0).integers(sizes.vocab_size, size=shape, dtype=np.int32)


def _generation(stream: Callable[[], Any], case: Generation) -> dict[str, float]:
    """Milliseconds until the first token, and for each token after it."""
    start = time.perf_counter()
    tokens = iter(stream())
    next(tokens)
    first = time.perf_counter()
    rest = sum(1 for _ in tokens)
    end = time.perf_counter()
    assert rest == case.new_tokens - 1
    return {
        f"prefill {case.prompts}": 1000 * (first - start),
        f"decode {case.prompts}": 1000 * (end - first) / rest,
    }


def _steps(sizes: Sizes) -> dict[str, int]:
    """How many steps of each part a workload runs."""
    parts = {"train": 1, HOP: 1}
    for case in sizes.generations:
        parts |= {f"prefill {case.prompts}": 1, f"decode {case.prompts}": case.new_tokens - 1}
    return parts


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    # Replies go to what was standard output; whatever libraries print goes to standard error.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kind, variants, *place, sizes_json = sys.argv[1:]
    build = {"ours": build_ours, "dense": build_dense, "torch": build_torch}[kind]
    place, sizes = Place(*map(int, place)), Sizes.from_json(sizes_json)
    if kind != "torch":
        _join(place)
    built = {variant: build(variant, place, sizes) for variant in json.loads(variants)}
    for workloads, _ in built.values():
        for workload in workloads.values():
            workload()
    has = {v: {"workloads": list(workloads), **about} for v, (workloads, about) in built.items()}
    print(json.dumps(has), file=replies)
    for line in sys.stdin:
        variant, name, wanted = json.loads(line)
        workload = built[variant][0][name]
        if wanted == "profile":
            answer = link_profile.profile(workload, _steps(sizes))
        else:
            answer = workload()
        print(json.dumps(answer), file=replies)
    # Without waiting for the other hosts, which have all been told to end.
    os._exit(0)


if __name__ == "__main__":
    main()
