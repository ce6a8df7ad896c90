"""The table of chips, and what a group of devices gets of their links."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from caat_jax.devices import chips
from caat_jax.devices.chips import CHIPS, FIGURES, Link
from caat_jax.errors import InputError

DOCUMENT = Path(chips.__file__).parents[2] / "docs/step_time_model.md"


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_figure_has_a_source(chip):
    assert sorted(chip.sources) == sorted(FIGURES)
    assert all(chip.sources.values())
    numbers = (chip.flops, chip.memory_bytes, chip.memory_rate, chip.domain)
    links = [(link.bandwidth, link.latency) for link in (chip.link, chip.network)]
    assert all(number > 0 for number in itertools.chain(numbers, *links))


@pytest.mark.parametrize(
    "figure", [None, 197e12, [197e12, ""], [0, "a source"], ["197e12", "a source"]], ids=str
)
def test_a_figure_without_number_or_source_is_refused(figure):
    table = tomllib.loads(Path(chips.__file__).with_name("chips.toml").read_text("utf-8"))["v5e"]
    table["flops"] = figure
    with pytest.raises(ValueError, match=r"v5e\.flops must be \[number above 0, source\]"):
        chips._chip("v5e", table)


def test_names_are_unique():
    names = [chip.name for chip in CHIPS]
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)


def test_assumptions_are_told_from_published_figures():
    assert chips.by_name("h100-nvlink").assumptions == ()
    assert chips.by_name("gaudi3").assumptions == ("link.latency", "network.latency")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"--chip=v5 is not .* nearest is v5\w; .*h100-nvlink"):
        chips.by_name("v5")


def test_a_torus_axis_doubles_where_it_closes():
    link = Link(bandwidth=10.0, latency=1.0, closes_at=4)
    assert [link.send_rate(n) for n in (2, 4, 6, 8)] == [10, 20, 10, 20]
    assert link.hops(8) == 7


def test_a_full_mesh_uses_the_wires_to_those_that_take_part():
    link = Link(bandwidth=70.0, latency=1.0, peers=7)
    assert [link.send_rate(n) for n in (2, 4, 8)] == [10, 30, 70]
    assert link.hops(8) == 1


def test_a_group_that_leaves_the_host_uses_the_network():
    chip = chips.by_name("h100-nvlink")
    assert (chip.link_over(8), chip.link_over(9)) == (chip.link, chip.network)
    assert chips.by_name("v5e").link_over(256).bandwidth == 45e9
    assert chips.by_name("v5e").link_over(512).bandwidth == 3.125e9
    assert chips.by_name("h100-infiniband").link_over(2).bandwidth == 50e9


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_document_has_the_same_figures(chip):
    def rate(link):
        return f"{link.bandwidth / 1e9:g}, {link.latency * 1e6:g}"

    row = (
        f"| {chip.name} | {chip.flops / 1e12:g} | {chip.memory_bytes / 1e9:.0f}"
        f" | {chip.memory_rate / 1e12:g} | {chip.domain} | {rate(chip.link)}"
        f" | {rate(chip.network)} |"
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    assert row in text
    for url in re.findall(r"https://[^,: ]+", " ".join(chip.sources.values())):
        assert url in text
