"""Targets as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelrt.errors import TargetError
from accelrt.target import Target, parse, parse_devices, requested


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", Target("cpu")),
        (" cpu ", Target("cpu")),
        ("cpu/openvino", Target("cpu", "openvino")),
        ("neuron:0-3", Target("neuron", None, (0, 1, 2, 3))),
        ("cuda/tensorrt:0,2-3", Target("cuda", "tensorrt", (0, 2, 3))),
    ],
)
def test_forms(text: str, expected: Target) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "CPU", "cpu/", "cpu:", "cpu/onnx runtime", "cpu:-1", "cpu:3-1", "cpu:0,0", "cpu:x", "/x", "cpu//x", "cpu:٣"],
)
def test_what_is_no_target_says_so(text: str) -> None:
    with pytest.raises(TargetError):
        parse(text)


def test_ranges_are_bounded() -> None:
    with pytest.raises(TargetError, match="names 999999 devices"):
        parse("cpu:1-999999")


@given(st.lists(st.integers(0, 300), min_size=1, unique=True))
def test_targets_survive_being_written(devices: list[int]) -> None:
    target = Target("neuron", "emulator", tuple(devices))
    assert parse(str(target)) == target


@given(st.text())
def test_any_text_is_a_target_or_an_error(text: str) -> None:
    try:
        assert isinstance(parse(text), Target)
    except TargetError as error:
        assert error.message


def test_devices_as_numbers() -> None:
    assert parse_devices(2) == (2,)
    assert parse_devices([3, 1]) == (3, 1)
    for wrong in ([], [1.0], [-1], [1, 1], True and [True]):
        with pytest.raises(TargetError):
            parse_devices(wrong)  # type: ignore[arg-type]


def test_the_variable_is_asked_when_the_argument_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested(None) == Target("cpu")
    monkeypatch.setenv("ACCELRT_BACKEND", "cpu/reference")
    assert requested(None) == Target("cpu", "reference")
    assert requested("cpu/onnxruntime") == Target("cpu", "onnxruntime")
    monkeypatch.setenv("ACCELRT_BACKEND", "Nonsense!")
    with pytest.raises(TargetError, match=r"ACCELRT_BACKEND.*'Nonsense!' is not a target"):
        requested(None)
