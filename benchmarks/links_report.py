"""Reports what `links.py` measured: tables and a plot of speed-ups, bounds and times."""

import csv
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caat_jax import figures

WORKLOADS = ("train", "prefill", "decode")
NO_LIMIT = "none"


def our_name(p: float, wire: str = "float32") -> str:
    """The name of this project's system at p with reductions of this type in both directions."""
    return f"caat_jax, p = {p:g}" + f" {wire}" * (wire != "float32")


BASE = our_name(1.0)


def workload_of(part: str) -> str:
    """One of `WORKLOADS`: the first word of a part, such as "prefill 16x32"."""
    return part.split()[0]


class Measurements:
    """Times, predictions and profiles, by (rate, system, part)."""

    def __init__(self, rates: dict[str, float | None], wire_bytes: dict[str, dict[str, float]]):
        """Takes Mbit/s by rate, and the bytes that a host sends in a step, by system and part."""
        self.rates, self.wire_bytes = rates, wire_bytes
        self.times: dict[tuple[str, str, str], list[float]] = {}
        self.predictions: dict[tuple[str, str, str], float] = {}  # milliseconds
        self.hops: dict[str, list[float]] = {}  # by rate; milliseconds, first and later rounds
        self.profiles: dict[tuple[str, str, str], dict[str, float]] = {}

    def add_time(self, rate: str, system: str, part: str, milliseconds: float) -> None:
        """Adds the time of one more round."""
        self.times.setdefault((rate, system, part), []).append(milliseconds)

    def hop(self, rate: str) -> float:
        """The median milliseconds from one host to the next."""
        return statistics.median(self.hops[rate])

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part, rate and system; times in milliseconds."""
        rows = [self._row(*key) for key in self.times]
        systems = list(self.wire_bytes)
        return sorted(
            rows,
            key=lambda row: (
                *_part_order(row["part"]),
                list(self.rates).index(row["rate"]),
                systems.index(row["system"]),
            ),
        )

    def _row(self, rate: str, system: str, part: str) -> dict[str, Any]:
        times = self.times[rate, system, part]
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        ratios = [b / ms for b, ms in zip(self.times[rate, BASE, part], times, strict=True)]
        row = {
            "part": part,
            "rate": rate,
            "system": system,
            "ms": statistics.median(times),
            "ms_quartiles": [quartiles[0], quartiles[2]],
            "speed_up": statistics.median(ratios),
        }
        if part not in self.wire_bytes[system]:
            return row
        bound, base_bound = self._bound(rate, system, part), self._bound(rate, BASE, part)
        row |= {
            "wire_bytes": self.wire_bytes[system][part],
            "link_ms": self._link_milliseconds(rate, system, part),
            "predicted_ms": self.predictions[rate, system, part],
            "communication_to_compute": row["ms"] / self._without_limit(system, part) - 1,
            "bound_ms": bound,
            "bound_speed_up": base_bound / bound,
            "reached": row["speed_up"] / (base_bound / bound),
        }
        profile = self.profiles[rate, system, part]
        return row | {f"profile_{name}_ms": value for name, value in profile.items()}

    def _bound(self, rate: str, system: str, part: str) -> float:
        return self._without_limit(system, part) + self._link_milliseconds(rate, system, part)

    def _without_limit(self, system: str, part: str) -> float:
        return statistics.median(self.times[NO_LIMIT, system, part])

    def _link_milliseconds(self, rate: str, system: str, part: str) -> float:
        megabits = self.rates[rate]
        bits = self.wire_bytes[system][part] * 8
        return 0.0 if megabits is None else 1000 * bits / (megabits * 1e6)


def print_rate(measured: Measurements, rate: str) -> None:
    """Prints a table for each part."""
    rows = [row for row in measured.rows() if row["rate"] == rate]
    for part in dict.fromkeys(row["part"] for row in rows):
        print(f"\n{part}, link {rate}; in collectives and computing: from one profiled run")
        print(
            f"{'':32}{'ms':>9} {'speed-up':>8} {'bound':>6} {'reached':>7} {'link ms':>8}"
            f" {'predict.':>8} {'in coll.':>8} {'comput.':>8}"
        )
        for row in rows:
            if row["part"] != part:
                continue
            print(f"{row['system']:32}{row['ms']:9.1f} {row['speed_up']:8.2f}", end="")
            if "bound_ms" in row:
                print(
                    f" {row['bound_speed_up']:6.2f} {row['reached']:7.2f} {row['link_ms']:8.1f}"
                    f" {row['predicted_ms']:8.1f} {row['profile_collective_ms']:8.1f}"
                    f" {row['profile_operation_ms']:8.1f}",
                    end="",
                )
            print()


def write(measured: Measurements, about: dict[str, Any], output: Path) -> None:
    """Writes OUTPUT.json, OUTPUT.csv, OUTPUT.md and OUTPUT.png."""
    paths = [output.with_name(output.name + suffix) for suffix in (".json", ".csv", ".md", ".png")]
    json_path, csv_path, markdown_path, png_path = paths
    rows = measured.rows()
    hops = {rate: measured.hop(rate) for rate in measured.hops}
    json_path.write_text(json.dumps(about | {"hop_ms": hops, "rows": rows}, indent=1) + "\n")
    tables = [*markdown_tables(rows).values(), predictions_table(rows)]
    markdown_path.write_text("\n".join(tables))
    with csv_path.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, measured.rates, png_path)
    print(f"\nwritten: {', '.join(map(str, paths))}", flush=True)


def markdown_tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Markdown tables: "speed-up" of p < 1, "others" relative to p = 1, and "time" spent."""
    parts, rates, systems = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("part", "rate", "system")
    )
    cells = {(row["part"], row["system"], row["rate"]): row for row in rows}

    def by_rate(chosen: list[str], cell: Callable[[dict[str, Any]], str]) -> str:
        lines = [
            [part, system, *(cell(cells[part, system, rate]) for rate in rates)]
            for part in parts
            for system in chosen
            if (part, system, rates[0]) in cells
        ]
        return _table(["", "", *rates], lines)

    ours = [row["system"] for row in rows if "bound_ms" in row]
    others = [system for system in systems if system not in ours]
    time_lines = [
        [
            row["part"],
            row["system"],
            row["rate"],
            *(f"{value:,.0f}" for value in _times_spent(row)),
        ]
        for row in rows
        if "bound_ms" in row
    ]
    return {
        "speed-up": by_rate(
            [system for system in systems if system in ours and system != BASE],
            lambda row: f"{row['speed_up']:.2f} ({row['bound_speed_up']:.2f})",
        ),
        "others": by_rate(
            [BASE, *others],
            lambda row: (
                f"{row['ms']:,.0f} ms" if row["system"] == BASE else f"{1 / row['speed_up']:.2f}"
            ),
        ),
        "time": _table(
            [
                "",
                "",
                "link",
                "ms",
                "of bytes",
                "profiled",
                "in collectives",
                "computing",
                "neither",
            ],
            time_lines,
        ),
    }


def predictions_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: times as fast as p = 1 (milliseconds, predicted / measured), by rate."""
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "predicted_ms" in row:
            agreement = row["predicted_ms"] / row["ms"]
            cell = f"{row['speed_up']:.2f} ({row['ms']:,.1f} ms, {agreement:.2f})"
            cells.setdefault((row["part"], row["system"]), []).append(cell)
    return _table(["", "", *rates], [[*names, *found] for names, found in cells.items()])


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rules = ["---"] * 2 + ["--:"] * (len(heads) - 2)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, rules, *lines])


def _times_spent(row: dict[str, Any]) -> list[float]:
    total, collective, operation = (
        row[f"profile_{name}_ms"] for name in ("total", "collective", "operation")
    )
    return [row["ms"], row["link_ms"], total, collective, operation, total - collective - operation]


@figures.style()
def _plot(rows: list[dict[str, Any]], rates: dict[str, float | None], path: Path) -> None:
    """Plots the speed-up over p = 1, and its bound, by the rate of the link."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    ours = list(dict.fromkeys(row["system"] for row in rows if "bound_ms" in row))
    measured = {row["rate"] for row in rows}
    ticks = sorted(measured, key=lambda rate: rates[rate] or float("inf"))
    columns = min(3, len(parts))
    rows_of_panels = -(-len(parts) // columns)
    figure = figures.new(4 * columns, 3.2 * rows_of_panels)
    grid = figure.subplots(rows_of_panels, columns, sharey=True, squeeze=False)
    panels = grid.flat[: len(parts)]
    for panel in grid.flat[len(parts) :]:
        panel.set_visible(False)
    for panel, part in zip(panels, parts, strict=True):
        for number, system in enumerate(ours):
            chosen = {r["rate"]: r for r in rows if (r["part"], r["system"]) == (part, system)}
            look = figures.line(number)
            gains = [chosen[rate]["speed_up"] for rate in ticks]
            panel.plot(ticks, gains, label=system.split(", ")[1], **look)
            bounds = [chosen[rate]["bound_speed_up"] for rate in ticks]
            panel.plot(ticks, bounds, ":", color=look["color"])
        panel.set_title(re.sub(r" (\d+)x(\d+)", r", \1 x \2 tokens", part))
        panel.set_xticks(range(len(ticks)), [_rate_name(rates[rate]) for rate in ticks])
        panel.margins(x=0.12)
    for panel in grid[:, 0]:
        panel.set_ylabel("times as fast as p = 1")
    panels[0].plot([], [], ":", color="gray", label="bound")
    panels[0].legend()
    figures.save(figure, path)


def _rate_name(megabits: float | None) -> str:
    return "no limit" if megabits is None else f"{megabits:g} Mbit/s"


def _part_order(part: str) -> tuple[int, ...]:
    """The order of WORKLOADS, then by batch."""
    return WORKLOADS.index(workload_of(part)), *map(int, re.findall(r"\d+", part))
