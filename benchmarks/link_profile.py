"""Where a workload's time goes, by JAX's own profiler: collectives, other operations, neither."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

# Operations are named after their origin: a function of JAX or an operation of XLA.
_COLLECTIVE = re.compile(r"psum|pmax|pmin|all[-_]|reduce[-_]scatter|collective")

Interval = tuple[float, float]


def profile(
    workload: Callable[[], dict[str, float]], steps: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Runs a workload under the profiler.

    Args:
      workload: returns the milliseconds of one step of each of its parts, such as {"train": 812.5}.
        The names of a part's programs contain the first word of the part's name.
      steps: how many steps of each part the workload runs.

    Returns:
      For each part, in milliseconds per step: "total"; "collective", while a collective was in
      progress, which includes waiting for other processes; and "operation", while only other
      operations were.  The rest of the total is Python and the start of programs.
    """
    import jax  # after the workers have set their environment

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            times = workload()
        (path,) = Path(folder).rglob("*.xplane.pb")
        recorded = jax.profiler.ProfileData.from_file(str(path))
    operations: dict[str, list[tuple[str, Interval]]] = {part: [] for part in times}
    for plane in recorded.planes:
        for line in plane.lines:
            for event in line.events:
                about = dict(event.stats)
                if "hlo_op" not in about:
                    continue
                for part in times:
                    if part.split()[0] in about["hlo_module"]:
                        interval = event.start_ns, event.start_ns + event.duration_ns
                        operations[part].append((event.name, interval))
    return {
        part: {"total": total, **_milliseconds(operations[part], steps[part])}
        for part, total in times.items()
    }


def _milliseconds(operations: list[tuple[str, Interval]], steps: int) -> dict[str, float]:
    collectives = [interval for name, interval in operations if _COLLECTIVE.match(name)]
    collective = covered(collectives)
    any_operation = covered(interval for _, interval in operations)
    return {
        "collective": collective / 1e6 / steps,
        "operation": (any_operation - collective) / 1e6 / steps,
    }


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
