"""Every figure on the pages that was measured is the one in the results file beside them.

Each of the generators below fills sentences in from some files, which must stand on their pages in
these words: (page, sentence, figures).  docs/quality.md and quality_studies.md have
tests of their own, tests/sweep/test_quality_docs.py; what was computed instead of measured is in
tests/test_predicted_figures.py.
"""

import re

import pytest

from benchmarks import links_report
from caat_jax.sweep import plan as plans
from caat_jax.sweep import report
from configs import equivalence, sweep
from tests.figures import DOCS, missing, read_csv, read_json
from tests.sweep.test_quality_docs import results_of

PARTS = ("train", "prefill 1x64", "prefill 64x8", "decode 1x64", "decode 64x8")


def links(name):
    return {(r["part"], r["rate"], r["system"]): r for r in read_json(name)["rows"]}


def ours(key, p, rate, *parts, of):
    """One column of `caat_jax, p = …` at a rate, for each part."""
    return [of[part, rate, links_report.our_name(p)][key] for part in parts]


def link_sentences():
    first = links("links.json")

    def gains(p, rate, *parts, of=first):
        return ours("speed_up", p, rate, *parts, of=of)

    train, one, many, one_decoded, decode = PARTS
    slow, none = links("links_400mbit.json"), links("links_none.json")
    ratios = ours("communication_to_compute", 1.0, "25mbit", train, many, decode, of=first)
    yield "README.md", "{:.0f} times as long as computation", ratios[:1]
    yield (
        "README.md",
        "training is {:.2f} times as fast at p = 0.5 as at p = 1, and decode of 64 sequences {:.2f}"
        " times",
        gains(0.5, "25mbit", train, decode),
    )
    yield (
        "docs/idea.md",
        "[{:.1f} times as fast](benchmarks.md), where 64 sequences at a time were {:.1f} times",
        gains(0.5, "25mbit", one_decoded, decode),
    )
    yield (
        "docs/benchmarks.md",
        "communication takes {:.1f} times as long as computation in training, {:.0f} times in the"
        " prefill of 64 x 8 tokens and {:.1f} times in decode of 64 sequences",
        ratios,
    )
    yield (
        "docs/benchmarks.md",
        "p = 0.5 speeds up training {:.2f} times, prefill {:.2f} and {:.2f} times, and decode"
        " {:.2f} times; p = 0.25 gives {:.2f}, {:.2f} and {:.2f}, and {:.2f}",
        [gain for p in (0.5, 0.25) for gain in gains(p, "25mbit", train, one, many, decode)],
    )
    yield (
        "docs/benchmarks.md",
        "{:.2f} in training, {:.2f} and {:.2f} in prefill",
        gains(0.5, "100mbit", train, one, many),
    )
    yield "docs/benchmarks.md", "{:.2f} in decode of 64 sequences", gains(0.5, "100mbit", decode)
    pairs = [
        (row["speed_up"], row["bound_speed_up"])
        for part, p in ((train, 0.5), (train, 0.25), (one, 0.5), (decode, 0.5))
        for row in [slow[part, "400mbit", links_report.our_name(p)]]
    ]
    yield (
        "docs/benchmarks.md",
        "training {:.2f} of {:.2f} at p = 0.5 and {:.2f} of {:.2f} at p = 0.25, prefill of one"
        " prompt {:.2f} of {:.2f}, decode of 64 sequences {:.2f} of {:.2f}",
        [figure for pair in pairs for figure in pair],
    )
    profiled = slow[train, "400mbit", links_report.our_name(0.5)]
    yield (
        "docs/benchmarks.md",
        "of its {:.0f} ms, a training step at p = 0.5 spends {:.0f} in collectives, for {:.0f} ms"
        " of bytes; without any limit it still spends {:.0f}",
        [profiled[key] for key in ("ms", "profile_collective_ms", "link_ms")]
        + ours("profile_collective_ms", 0.5, "none", train, of=slow),
    )
    for p in (0.5, 0.25):
        yield (
            "docs/benchmarks.md",
            ", ".join(["{:.2f}"] * 4) + f" and {{:.2f}} at p = {p:g}",
            [1 / gain for gain in gains(p, "none", *PARTS, of=none)],
        )


def log_sentences():
    again = links("links_again.json")
    for rate in ("25mbit", "100mbit", "400mbit"):
        for p in (0.5, 0.25):
            yield (
                "docs/log.md",
                f"| {rate[:-4]} | {p:g} | " + " | ".join(["{:.2f}"] * 5) + " |",
                ours("speed_up", p, rate, *PARTS, of=again),
            )
    longer = links("links_train_25mbit.json")
    gains = [ours("speed_up", p, "25mbit", "train", of=longer)[0] for p in (0.5, 0.25)]
    yield "docs/log.md", "gave {:.2f} at p = 0.5 and {:.2f} at p = 0.25", gains


def conversion_sentences():
    small = {row["way"]: float(row["loss"]) for row in read_csv("conversion/small.csv")}
    dense = float(read_csv("conversion/small.csv")[0]["dense_loss"])
    yield "docs/conversion.md", "| dense | {:.4f} | |", [dense]
    for way, name in {
        "cut": "plain cut: the first channels shared",
        "channels": "channels reordered",
        "channels, fitted": "channels reordered, then fitted",
        "rotation": "rotated",
        "rotation, fitted": "rotated, then fitted",
    }.items():
        numbers = [small[way], small[way] - dense]
        yield "docs/conversion.md", f"| {name} | {{:.4f}} | {{:.4f}} |", numbers
    runs = {
        "0.75": "smollm2_three_quarters",
        "0.4915, the first MLP whole": "smollm2_first_mlp_whole_49k",
        "0.5": "smollm2_49k",
        "0.5, few tokens": "smollm2",
    }
    for name, file in runs.items():
        found = read_json(f"conversion/{file}.json")
        cut = "{cut_loss:.4f} " if "cut_loss" in found else ""
        yield (
            "docs/conversion.md",
            f"| {name} | {{calibration_tokens:,}}, {{held_out_tokens:,}} | {{dense_loss:.4f}} |"
            f" {cut}| {{loss:.4f}} | {{rise:.4f}} |",
            found | {"rise": found["loss"] - found["dense_loss"]},
        )
    half = read_json("conversion/smollm2_49k.json")
    yield (
        "README.md",
        "It loses {:.3f} nats at p = 0.5 with a 0.9 M-parameter model, and {:.2f} with"
        f" SmolLM2-135M on {half['calibration_tokens']:,} tokens",
        [small["rotation, fitted"] - dense, half["loss"] - half["dense_loss"]],
    )
    for row in read_csv("conversion/training_on.csv"):
        yield (
            "docs/conversion.md",
            f"| {row['sync_factor']} | {{:.4f}} | {{:.4f}} | {{:.4f}} |",
            [float(row[name]) for name in ("converted", "text", "teacher")],
        )


def wire_sentences():
    rows = links("links_wires.json")
    base, half = links_report.our_name(1.0), links_report.our_name(0.5, "int8")
    low = links_report.our_name(1.0, "bfloat16")
    for part, name in (("train", "a training step"), ("prefill 8x64", "prefill of 8 x 64 tokens")):
        times = [rows[part, "8mbit", system]["ms"] for system in (base, low, half)]
        yield (
            "docs/wires.md",
            f"| {name} | {{:,.0f}} | {{:,.0f}} | {{:,.0f}} | {{:.2f}} times as fast |",
            [*times, times[1] / times[2]],
        )
    fewer = [
        rows[part, "8mbit", low]["wire_bytes"] / rows[part, "8mbit", half]["wire_bytes"]
        for part in ("train", "prefill 8x64")
    ]
    yield "docs/wires.md", "The bytes are {:.2f} and {:.2f} times fewer", fewer
    for part, name in (("train", "training"), ("prefill 8x64", "prefill")):
        times = [rows[part, "none", system]["ms"] for system in (base, low, half)]
        yield "docs/log.md", f"{{:.0f}}, {{:.0f}} and {{:.0f}} ms in {name}", times


def quality_sentences():
    half, quarter, none = (summaries("equivalence", equivalence)[p, 8] for p in (0.5, 0.25, 0.0))
    assert half.verdict.word == quarter.verdict.word
    yield (
        "README.md",
        "p = 0.5 and 0.25 are {} than full synchronisation (upper bounds {:+.3f} and {:+.3f});"
        " nothing synchronised is {}, by {:.3f}",
        [half.verdict.word, half.upper, quarter.upper, none.verdict.word, none.difference],
    )
    yield (
        "docs/quality.md",
        "they end {:.3f} and {:.3f} nats below it, with upper bounds of {:+.3f} and {:+.3f}",
        [-half.difference, -quarter.difference, half.upper, quarter.upper],
    )
    yield (
        "docs/quality.md",
        "the positive control, is {}, by {:.3f} (at least {:.3f})",
        [none.verdict.word, none.difference, none.lower],
    )
    half, quarter = (summaries("sweep", sweep)[p, 8] for p in (0.5, 0.25))
    yield (
        "README.md",
        "put p = 0.5 about level ({:.3f} ± {:.3f}) and p = 0.25 above p = 1 ({:+.3f} ± {:.3f})",
        [figure for s in (half, quarter) for figure in (s.difference, (s.upper - s.lower) / 2)],
    )
    base = float(read_csv("quality/sensitivity.csv")[0]["loss"])
    yield "docs/quality_studies.md", "{:.4f} without a cut, over the whole validation split", [base]


def step_time_sentences():
    rows = read_json("measured/step_time.json")["rows"]
    number = {row["system"]: n for n, row in enumerate(rows, start=1)}
    for row in rows:
        against = [row["ratio"], number[row["base"]]] if row["base"] != row["system"] else []
        yield (
            "docs/step_time.md",
            f"| {number[row['system']]} | {row['system']} | {{:,.0f}} | {{:,.0f}} | {{:,.0f}} |"
            + (" {:.2f} | {} |" if against else " | |"),
            [row["median_ms"], row["processor_ms"], row["tokens_per_second"], *against],
        )
    ratios = {row["system"]: row["ratio"] for row in rows}
    apart, together = (
        [ratios[f"caat_jax, {devices}, p = {p}"] for p in (0.5, 0.25)]
        for devices in ("8 devices", "1 device")
    )
    torch = [ratio for system, ratio in ratios.items() if "torch" in system]
    yield "docs/step_time.md", "PyTorch takes {:.2f} to {:.2f}", [min(torch), max(torch)]
    yield "docs/step_time.md", "p = 0.5 takes {:.2f} and p = 0.25 {:.2f} of p = 1's time", apart
    yield "docs/step_time.md", "p = 0.5 takes {:.2f} and p = 0.25 {:.2f} times as long", together
    yield "README.md", "{:.1f} to {:.1f} times p = 1", together
    yield "docs/idea.md", "[{:.1f} to {:.1f} times the step](step_time.md)", together


def size_sentences():
    tiny = parameters(264, 256, 768, layers=4, heads=8 * 32, kv_heads=8 * 32)
    yield "README.md", "a {:.1f} M-parameter model", [tiny / 1e6]
    smollm2 = dict(layers=30, heads=9 * 64, kv_heads=3 * 64, tied=True)
    source = parameters(49152, 576, 1536, **smollm2)
    nine = parameters(49158, 576, 1539, **smollm2)
    eight = parameters(49152, 576, 1536, **smollm2 | dict(heads=16 * 64, kv_heads=4 * 64))
    for padded in (nine, eight):
        figures = [source / 1e6, padded / 1e6]
        yield "docs/huggingface.md", "| {:.2f} M → {:.2f} M |", figures


def parameters(vocabulary, width, mlp, *, layers, heads, kv_heads, tied=False):
    """Of a Llama whose heads are so wide in all."""
    layer = 2 * width * (heads + kv_heads) + 3 * width * mlp + 2 * width
    return (1 if tied else 2) * vocabulary * width + layers * layer + width


def inference_sentences():
    names = {
        "1 device, p = 0.5": "1 device holding all 8 shards, p = 0.5",
        "8 devices, p = 1": "8 simulated devices, p = 1",
        "8 devices, p = 0.5": "8 simulated devices, p = 0.5",
    }
    for row in read_json("measured/inference.json"):
        system = row["system"].removeprefix("caat_jax, ")
        yield (
            "docs/inference.md",
            f"| {names.get(system, system)} | {row['batch']} | {{first_token_ms:.1f}} |"
            " {first_token_ratio:.2f} | {decode_tokens_per_second:,.0f} |"
            " {decode_time_ratio:.2f} |",
            row,
        )


def checkpointing_sentences():
    for run, name in (("tiny", "tiny, 16 x 256"), ("130m", "130M in float32, 8 x 256")):
        text = (DOCS / f"measured/checkpointing_{run}.txt").read_text()
        (megabytes,) = map(int, re.findall(r"(\d+) MB a checkpoint", text))
        ms = {
            name.strip(): float(value)
            for name, value in re.findall(r"^(.*?)  +([\d.]+) ms", text, re.M)
        }
        step, start, digests, restored = (
            ms["step, nothing being saved"],
            ms["start of a save"],
            ms["digests compared"],
            ms["restored, digests not compared"],
        )
        (ratio,) = re.findall(r"start of a save .* ms +([\d.]+) of a step", text)[1:]
        cells = (
            f"{megabytes} MB | {step:,.0f} ms | {ratio} of a step | {start:.0f} ms |"
            f" {digests:.0f} ms | {restored:.0f} ms |"
            if megabytes < 1000
            else f"{megabytes / 1e3:.1f} GB | {step / 1e3:.1f} s | {ratio} of a step |"
            f" {start:.0f} ms | {digests / 1e3:.2f} s, {megabytes / digests:.1f} GB/s |"
            f" {restored / 1e3:.2f} s |"
        )
        yield "docs/scale_out.md", f"| {name} tokens | {cells}", []


def summaries(name, module):
    plan = plans.resolve(module.get_config())
    return {found.setting: found for found in report.summarise(plan, results_of(name, plan))}


@pytest.mark.parametrize(
    "sentences",
    [
        link_sentences,
        log_sentences,
        conversion_sentences,
        wire_sentences,
        quality_sentences,
        checkpointing_sentences,
        inference_sentences,
        size_sentences,
        step_time_sentences,
    ],
    ids=lambda function: function.__name__,
)
def test_pages_say_what_the_results_say(sentences):
    assert missing(sentences()) == []
