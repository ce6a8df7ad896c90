"""Every figure on the pages that was computed is the one in the file beside them.

As tests/test_figures.py; the files are what commands printed, the programs compiled or traced by
them.
"""

import math
import re

import pytest

from caat_jax.devices import chips
from tests.figures import DOCS, missing, read_csv, read_json

OVERLAPPED = "all_overlaps"


def communication_sentences():
    """What `python -m caat_jax.communication` printed for the paper's 7B on two pods."""
    tpus, gpus, prefill = (
        (DOCS / f"measured/7b_{pod}.txt").read_text().split("Sent by one device in one step")[1]
        for pod in ("64_v5p", "8_h100", "prefill_64_v5p")
    )

    def megabytes(*places):
        rows = [
            re.search(rf"^model +{place} +([\d,.]+) +([\d,.]+) ", tpus, re.M) for place in places
        ]
        columns = zip(*(map(number, row.groups()) for row in rows), strict=True)
        return [sum(column) / 1e3 for column in columns]

    layers = megabytes("layer forward", "layer backward")
    yield (
        "README.md",
        "| sent over `model` in the layers, forward and backward | {:.1f} GB | {:,.0f} GB |",
        layers,
    )
    yield (
        "README.md",
        "| sent over `model` in all, embedding and loss included | {:.1f} GB | {:,.0f} GB |",
        megabytes("all"),
    )
    seconds = "{:.2f} s, {:.2f} s ({:.0f} %) | {:.2f} s, {:.2f} s ({:.0f} %) |"
    milliseconds = "{:.1f} ms, {:.1f} ms ({:.0f} %) | {:.0f} ms, {:.0f} ms ({:.0f} %) |"
    for text, row, unit, figures in (
        (tpus, "exposed: 64 v5p", 1e3, seconds),
        (gpus, "an eighth of the batch)", 1e3, seconds),
        (prefill, "7b_prefill_64_v5p.txt))", 1, milliseconds),
    ):
        (half, half_all), (full, full_all) = exposed(text, "layers")["model"]
        yield (
            "README.md",
            f"{row} | {figures}",
            [
                *(half_all / unit, half / unit, 100 * half / half_all),
                *(full_all / unit, full / unit, 100 * full / full_all),
            ],
        )
    memory = re.search(r"memory, GiB: together +(\S+) +(\S+)", tpus).groups()
    yield "README.md", "| memory, 64 v5p | {:.2f} GiB | {:.2f} GiB |", map(float, memory)


def overlap_sentences():
    """What is exposed in the layers, and how much longer all that is exposed makes a step."""
    both = "| 2 | {half} | {full} | {half_step} | {full_step} |"
    for name, chip, rows in (
        (
            "7b_64_v5p",
            "v5p",
            (
                "| 1 | {half} | 6,197 of 8,046 (77 %) | {half_step} | |",
                "| 2 | 328 of 572, of four layers (57 %) | {full} | | {full_step} |",
            ),
        ),
        ("7b_8_h100", "h100-nvlink", (both,)),
        ("1b_8_h100", "h100-nvlink", (both,)),
        ("7b_prefill_64_v5p", "v5p", (both.removeprefix("| 2 "),)),
        ("7b_prefill_8_h100", "h100-nvlink", (both,)),
    ):
        text = (DOCS / f"measured/{name}.txt").read_text()
        layers, everywhere = exposed(text, "layers"), exposed(text, "all")
        products = re.search(r"products, with recomputation +(\S+) +(\S+)", text).groups()
        cells = {}
        for column, p in enumerate(("half", "full")):
            ours, others = layers["model"][column], everywhere.get("fsdp", [(0, 0)] * 2)[column]
            alone = 1e15 * number(products[column]) / chips.by_name(chip).flops + others[0]
            cells[p] = "{} of {} ({:.0f} %)".format(
                *map(milliseconds, ours), 100 * ours[0] / ours[1]
            )
            cells[f"{p}_step"] = f"+{100 * everywhere['model'][column][0] / alone:.0f} %"
        for row in rows:
            yield "docs/communication.md", row, cells


def exposed(text, places):
    """By axis, at p = 0.5 and at p = 1: ms exposed, of ms."""
    pattern = rf"^(\w+) +exposed: {places} +(\S+) of (\S+) +(\S+) of (\S+)"
    return {
        axis: [tuple(map(number, cells[:2])), tuple(map(number, cells[2:]))]
        for axis, *cells in re.findall(pattern, text, re.M)
    }


def number(cell):
    return float(cell.replace(",", ""))


def milliseconds(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def prediction_sentences():
    for model, name in (("130m", "130M"), ("1b", "1.1B"), ("7b", "7B")):
        rows = read_json(f"measured/step_time_{model}.json")["predictions"]
        for chip in dict.fromkeys(row["chip"] for row in rows):
            full, half, quarter = (row for row in rows if row["chip"] == chip)
            cells = [span(row["step"], 1e3, digits) for row in (full, half, quarter)]
            cells += [span(full[key], 100, whole) for key in ("exposed_fraction", "mfu")]
            cells += [span(row["speed_up"], 1, "{:.2f}".format) for row in (half, quarter)]
            yield "docs/step_time_model.md", f"| {name} | {chip} | {' | '.join(cells)} |", []
    gains = {row["chip"]: row["speed_up"] for row in rows if row["p"] == "0.5"}
    yield (
        "docs/benchmarks.md",
        "it predicts {:.2f} times the speed of p = 1 on v5p, {:.2f} to {:.2f} on H100 with NVLink"
        " and {:.2f} to {:.2f} over InfiniBand alone",
        [gains["v5p"][OVERLAPPED]]
        + [gain for chip in ("h100-nvlink", "h100-infiniband") for gain in gains[chip].values()],
    )
    times = [
        1e3 * read_json(f"measured/step_time_7b_{wire}.json")["predictions"][1]["step"][OVERLAPPED]
        for wire in ("bfloat16", "int8")
    ]
    yield "docs/wires.md", "{:,.0f} ms at p = 0.5 in bfloat16 and {:,.0f} ms in int8", times


def span(bounds, unit, form):
    """Where all gathers and gradient sums overlap, and where none does."""
    ends = [form(unit * bounds[name]) for name in (OVERLAPPED, "nothing_overlaps")]
    return "\N{EN DASH}".join(dict.fromkeys(ends))


def digits(value):
    """Three, or all those before the point."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def whole(value):
    return f"{value:.0f}"


def compiled_sentences():
    """`python -m caat_jax.step_time --topology=h100:1x1x8`, with two parts of the batch and one."""
    two, one = (
        read_json(f"measured/step_time_7b_8_h100_{parts}.json")["predictions"]
        for parts in ("two_parts", "one_part")
    )
    for rows, name in (
        (two[:2], "`--chip`: nothing over `model` overlaps"),
        (one[2:], "`--topology`, `--config.compute.batch_parts=1`"),
        (two[2:], "`--topology`: two parts of the batch beside each other"),
    ):
        exposed, step = (
            [1e3 * row[key][OVERLAPPED] for row in rows] for key in ("exposed", "step")
        )
        yield (
            "docs/step_time_model.md",
            f"| {name} | {{:,.0f}} | {{:,.0f}} | {{:,.0f}} | {{:,.0f}} | {{:.2f}} |",
            [*exposed, *step, step[0] / step[1]],
        )
    above = [100 * row["exposed"][OVERLAPPED] / row["compute"] for row in (two[3], two[2])]
    yield (
        "docs/step_time_model.md",
        "Its step is {:.0f} % above that of the computation alone; that of p = 1 is {:.0f} % above",
        above,
    )


def wire_sentences():
    for row in read_csv("wires.csv"):
        name, *gains = row.values()
        cells = " | ".join(["{:.2f}"] * len(gains))
        yield "docs/wires.md", f"| {name} | {cells} |", map(float, gains)
    for row in read_csv("wires_decode.csv"):
        name, *times = row.values()
        cells = " | ".join(["{:,.0f}, {:,.0f}"] * (len(times) // 2))
        yield "docs/wires.md", f"| {name} | {cells} |", map(float, times)


@pytest.mark.parametrize(
    "sentences",
    [
        communication_sentences,
        overlap_sentences,
        prediction_sentences,
        compiled_sentences,
        wire_sentences,
    ],
    ids=lambda function: function.__name__,
)
def test_pages_say_what_the_files_say(sentences):
    assert missing(sentences()) == []
