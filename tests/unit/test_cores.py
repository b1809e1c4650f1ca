"""The grammar of core groups: what the documentation says is read so, and anything else is a typed error."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelrt.cores import (
    MOST_CORES,
    Group,
    core_groups,
    parse_group_sizes,
    parse_num_cores,
    parse_visible_cores,
    visible_cores,
)
from accelrt.errors import AccelrtError, CoresUnavailable, OptionError

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=12)
SPACES = st.sampled_from(["", " ", "  "])
HOSTILE = st.one_of(
    st.text(max_size=40),
    st.text("0123456789xX,-[] +_.e\n\0\u0661\u00b2", max_size=40),
    st.integers(-(10**30), 10**30).map(str),
    st.lists(st.integers(0, 10**9), max_size=9).map(lambda numbers: "x".join(map(str, numbers))),
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8,1,1,1,1,2,2", (8, 1, 1, 1, 1, 2, 2)),
        ("3,4,1", (3, 4, 1)),
        ("4x1", (1, 1, 1, 1)),
        ("2x3,1", (3, 3, 1)),
        ("[2,2]", (2, 2)),
        (" [ 2x1 , 2 ] ", (1, 1, 2)),
        ("1", (1,)),
    ],
)
def test_group_sizes_as_documented(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_group_sizes(text) == sizes


@given(SIZES, st.data())
def test_group_sizes_come_back_from_every_way_to_write_them(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    parts = []
    for copies, cores in sizes:
        plain = copies == 1 and data.draw(st.booleans())
        text = str(cores) if plain else f"{copies}{data.draw(st.sampled_from('xX'))}{cores}"
        parts.append(data.draw(SPACES) + text + data.draw(SPACES))
    text = ",".join(parts)
    if data.draw(st.booleans()):
        text = f"[{text}]"
    assert parse_group_sizes(text) == tuple(cores for copies, cores in sizes for _ in range(copies))


@pytest.mark.parametrize(
    "text",
    ["", ",", "0", "1,,2", "1,", "-1", "1.5", "x2", "2x", "0x4", "4x0", "2x2x2", "[1", "1]", "[[1]]", "1;2", "a",
     "999999x999999", "9" * 50, "1e3", "１", f"{MOST_CORES + 1}", "1\n,", "+1", "1_0", "0x10x"],
)  # fmt: skip
def test_what_is_no_group_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(OptionError, match="NEURONCORE_GROUP_SIZES"):
        parse_group_sizes(text)


@given(HOSTILE)
@example("1x" * 10_000)
@example("[" * 10_000)
@example(",".join(["999999x999999"] * 1000))
def test_hostile_text_is_sizes_or_one_kind_of_error(text: str) -> None:
    try:
        sizes = parse_group_sizes(text)
    except OptionError as error:
        assert "NEURONCORE_GROUP_SIZES" in error.message
        assert len(error.message) < 400
    else:
        assert sizes
        assert all(size >= 1 for size in sizes)
        assert sum(sizes) <= MOST_CORES
        assert parse_group_sizes(",".join(map(str, sizes))) == sizes


@pytest.mark.parametrize(
    ("text", "cores"), [("3", (3,)), ("3-6", (3, 4, 5, 6)), ("3,4,5", (3, 4, 5)), ("0,1-2, 3", (0, 1, 2, 3))]
)
def test_visible_cores_as_documented(text: str, cores: tuple[int, ...]) -> None:
    assert parse_visible_cores(text) == cores


@pytest.mark.parametrize("text", ["3,5,6", "6-3", "3,3", "2,1", "", "a", "0-", "-1", "0-999999", "0,1-5000", "1 2"])
def test_visible_cores_must_ascend_without_a_gap(text: str) -> None:
    with pytest.raises(OptionError, match="NEURON_RT_VISIBLE_CORES"):
        parse_visible_cores(text)


@given(HOSTILE, HOSTILE, HOSTILE, st.integers(0, 70))
def test_any_environment_is_groups_or_a_typed_error(visible: str, number: str, sizes: str, total: int) -> None:
    environ = {"NEURON_RT_VISIBLE_CORES": visible, "NEURON_RT_NUM_CORES": number, "NEURONCORE_GROUP_SIZES": sizes}
    try:
        cores = visible_cores(environ, total)
        groups = core_groups(environ, cores)
    except AccelrtError:
        return
    assert set(cores) <= set(range(total))
    listed = [core for group in groups for core in group.devices]
    assert listed == list(cores[: len(listed)])


def test_number_of_cores() -> None:
    assert parse_num_cores("4") == 4
    assert parse_num_cores("0") is None
    for text in ("", "-1", "two", "1.0", "9999999"):
        with pytest.raises(OptionError, match="NEURON_RT_NUM_CORES"):
            parse_num_cores(text)


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({}, range(8)),
        ({"NEURON_RT_NUM_CORES": "0"}, range(8)),
        ({"NEURON_RT_NUM_CORES": "3"}, range(3)),
        ({"NEURON_RT_VISIBLE_CORES": "4-6"}, range(4, 7)),
        ({"NEURON_RT_VISIBLE_CORES": "4-6", "NEURON_RT_NUM_CORES": "1"}, range(4, 7)),
        ({"NEURON_RT_VISIBLE_CORES": " ", "NEURON_RT_NUM_CORES": ""}, range(8)),
    ],
)
def test_visible_cores_win_over_their_number(environ: dict[str, str], cores: range) -> None:
    assert visible_cores(environ, 8) == tuple(cores)


def test_more_cores_than_there_are() -> None:
    for environ in ({"NEURON_RT_VISIBLE_CORES": "6-8"}, {"NEURON_RT_NUM_CORES": "9"}):
        with pytest.raises(CoresUnavailable, match=next(iter(environ))):
            visible_cores(environ, 8)
    with pytest.raises(CoresUnavailable, match=r"'3,4,2', which needs 9 cores; there are 8"):
        core_groups({"NEURONCORE_GROUP_SIZES": "3,4,2"}, range(8))


def test_sizes_cut_the_visible_cores_in_order() -> None:
    environ = {"NEURON_RT_VISIBLE_CORES": "8-15", "NEURONCORE_GROUP_SIZES": "3,2x2"}
    groups = core_groups(environ, visible_cores(environ, 16))
    assert groups == (Group((8, 9, 10), whole=True), Group((11, 12), whole=True), Group((13, 14), whole=True))
    assert core_groups({}, range(4)) == (Group((0, 1, 2, 3)),)
    assert core_groups({}, ()) == ()


@pytest.mark.parametrize("devices", [(), (1, 1), (-1,)])
def test_a_group_holds_each_device_once(devices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no group"):
        Group(devices)
