"""Options by name: an unknown one, or one of the wrong type, is an error and never ignored."""

from __future__ import annotations

from typing import Any

import pytest

import accelrt
from accelrt.data import digits_model
from accelrt.errors import InputError, OptionError
from accelrt.options import PartitionOptions, from_json, resolve
from accelrt.registry import REGISTRY
from accelrt.target import parse

CHAIN = REGISTRY.candidates(parse("cpu/openvino"))


def test_a_plain_name_reaches_every_engine_that_has_it() -> None:
    options = resolve({"threads": 2, "openvino.streams": 2, "min_segment_nodes": 3}, CHAIN)
    assert [getattr(engine, "threads", None) for engine in options.engines] == [2, 2, None]
    assert options.engines[0].streams == 2
    assert options.partition.min_segment_nodes == 3


def test_a_scoped_name_reaches_one_and_wins() -> None:
    options = resolve({"threads": 2, "onnxruntime.threads": 1}, CHAIN)
    assert [engine.threads for engine in options.engines[:2]] == [2, 1]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"thread": 2}, "Did you mean 'threads'"),
        ({"tensorrt.threads": 2}, "No option is named 'tensorrt.threads'"),
        ({"threads": "2"}, r"takes int, not '2' \(str\)"),
        ({"threads": True}, "takes int, not True"),
        ({"threads": -1}, "threads must be 0 to"),
        ({"threads": 100_000}, "threads must be 0 to"),
        ({"pinning": "no"}, "takes bool or None, not 'no'"),
        ({"min_segment_nodes": 0}, "must be 1 or more"),
    ],
)
def test_mistakes(given: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        resolve(given, CHAIN)


def test_options_of_an_artifact_are_checked_too() -> None:
    assert from_json(PartitionOptions, {"min_segment_nodes": 2}) == PartitionOptions(2)
    for wrong in ({"nonsense": 1}, {"min_segment_nodes": "2"}):
        with pytest.raises(OptionError):
            from_json(PartitionOptions, wrong)


def test_what_an_onnx_model_has_no_use_for_is_refused() -> None:
    with pytest.raises(OptionError, match="PyTorch"):
        accelrt.compile(digits_model(), options={"opset": 17})
    with pytest.raises(InputError, match="image"):
        accelrt.compile(digits_model(), example_inputs=[[1, 2, 3]])


def test_policies_are_three() -> None:
    with pytest.raises(OptionError, match="fallback must be one of warn, allow, error"):
        accelrt.compile(digits_model(), fallback="never")


def test_an_option_of_any_type_takes_any_value() -> None:
    shapes = ({0: "n"},)
    assert resolve({"dynamic_shapes": shapes}, ()).source.dynamic_shapes is shapes
