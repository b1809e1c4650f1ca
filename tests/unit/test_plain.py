"""Checks of plain data: what JSON can hold either comes back typed or raises one of two errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelrt import plain

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**600) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("check", "kinds"),
    [
        (plain.text, (str,)),
        (plain.whole, (int,)),
        (plain.number, (int, float)),
        (plain.items, (list,)),
        (plain.mapping, (dict,)),
    ],
)
@given(value=JSON)
def test_only_values_of_the_kind_come_back(check: Callable[[object], Any], kinds: tuple[type, ...], value: Any) -> None:
    value = json.loads(json.dumps(value))
    try:
        found = check(value)
    except (TypeError, ValueError):
        assert type(value) not in kinds or (type(value) is int and abs(value) > sys.float_info.max)
        return
    assert type(value) in kinds
    # A whole number may be too long for a float to hold it to the last digit.
    assert found == (float(value) if check is plain.number else value) or value != value


def test_one_of_several() -> None:
    assert plain.one_of("b", ("a", "b")) == "b"
    for wrong in ("c", None, ["a"], 1):
        with pytest.raises(ValueError, match="is none of a, b"):
            plain.one_of(wrong, ("a", "b"))
