"""Configurations of models: Triton's text format and JSON, accelrt's own settings, and what is hostile in them."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import OptionError, RequestError
from accelrt.serve.models.config import VersionPolicy, from_json, from_text
from accelrt.serve.models.settings import ModelSettings, ServiceSettings, merged, settings_from
from accelrt.serve.models.text_format import MAX_DEPTH, parse

FULL = """
# A comment.
name: "resnet" 'fifty'
platform: "onnxruntime_onnx"
max_batch_size: 16
input [
  { name: "image" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] },
  { name: "flag", data_type: TYPE_BOOL; dims: 1 reshape: { shape: [ ] } }
]
output < name: "scores" data_type: TYPE_STRING dims: [-1] label_filename: "labels.txt" >
version_policy: { specific { versions: [1, 3] } }
instance_group [ { count: 2 kind: KIND_CPU }, { } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5000 max_queue_size: 7 }
}
parameters { key: "a" value: { string_value: "tab\\t\\x41\\101" } }
model_warmup { name: "w" batch_size: 2 inputs { key: "image" value: { data_type: TYPE_FP32 dims: [3,224,224] random_data: true } } }
optimization { graph { level: 1 } }
default_model_filename: "net.onnx"
"""


def test_every_honoured_field_is_read_and_others_are_named() -> None:
    config = from_text(FULL)
    assert config.name == "resnetfifty" and config.max_batch_size == 16 and config.replicas == 3
    assert [(t.name, t.dtype, t.dims, t.reshape) for t in config.inputs] == [
        ("image", "float32", (3, 224, 224), None),
        ("flag", "bool", (1,), ()),
    ]
    assert config.outputs[0].dtype == "string" and config.outputs[0].dims == (-1,)
    assert config.version_policy == VersionPolicy("specific", 1, (1, 3))
    assert config.batching is not None
    assert config.batching.preferred_batch_sizes == (4, 8) and config.batching.max_queue_delay_us == 100
    assert (config.batching.priority_levels, config.batching.default_priority_level) == (3, 2)
    policy = config.batching.policy
    assert policy.delay and policy.timeout_us == 5000 and policy.max_queue_size == 7
    assert not policy.allow_timeout_override  # protobuf's default, once a policy is given
    assert config.parameters == {"a": "tab\tAA"}
    assert config.warmup[0].inputs[0].random and config.warmup[0].count == 1
    assert config.default_model_filename == "net.onnx"
    assert config.ignored == ("output.label_filename", "instance_group.kind", "optimization")


def test_json_says_the_same_as_text() -> None:
    text = from_text(
        'name: "m" max_batch_size: 4 dynamic_batching { } parameters { key: "k" value { string_value: "v" } }'
    )
    for document in (
        {"name": "m", "max_batch_size": 4, "dynamic_batching": {}, "parameters": {"k": {"string_value": "v"}}},
        {"name": "m", "maxBatchSize": "4", "dynamicBatching": {}, "parameters": {"k": {"stringValue": "v"}}},
    ):
        assert from_json(json.dumps(document)) == text
    latest = from_json(
        '{"version_policy": {"latest": {"num_versions": 2}}, "input": [{"name": "x", "dims": ["-1", 3]}]}'
    )
    assert latest.version_policy.count == 2 and latest.inputs[0].dims == (-1, 3)


@pytest.mark.parametrize(
    "text",
    [
        "name: ",
        "name 3",
        'name: "open',
        "max_batch_size: -1",
        "max_batch_size: 1.5",
        "max_batch_size: 99999999999999999999999999",
        "max_batch_size: 1 max_batch_size: 2",
        'input { name: "x" data_type: TYPE_FP33 }',
        "input { dims: [1, ] }",
        'input { name: "x" } input { name: "x" }',
        "input { data_type: TYPE_FP32 }",
        "input: 3",
        "version_policy { all { } latest { } }",
        "dynamic_batching { priority_levels: 2 }",
        "dynamic_batching { priority_levels: 2 default_priority_level: 3 }",
        "instance_group { count: 0 }",
        "instance_group { count: 1000 } instance_group { count: 1000 }",
        'default_model_filename: "../secret.onnx"',
        'default_model_filename: ".."',
        'name: "\\q"',
        "name: \x00",
        "}",
        "a { ",
        "a { > ",
        "[type.googleapis.com/x] { }",
        "a: 0x",
        "a: 1.5.5",
        "a {" * (MAX_DEPTH + 2),
        "a: [" * 50,
        "a: " + "1" * 100 + "x",
    ],
)
def test_what_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        from_text(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"input": {"dims": [{}]}}', '{"input": 3}', "[" * 100_000, '{"name": 1}']
)
def test_json_that_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        from_json(text)


@given(st.text(alphabet="{}<>[]:,;\"'\\#-.0123456789eExfab _\n\x00é", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        from_text(text)
    except RequestError as error:
        assert len(str(error)) < 600


names = st.text(alphabet=string.ascii_lowercase + "_", min_size=1, max_size=8)
scalars = st.one_of(st.integers(-(10**15), 10**15), st.booleans(), st.text(max_size=12))
messages = st.recursive(
    st.dictionaries(names, st.lists(scalars, min_size=1, max_size=3), max_size=3),
    lambda inner: st.dictionaries(names, st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=12,
)


def _written(message: dict[str, list[Any]], listed: bool) -> str:
    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + _written(item, listed) + "}"
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, str):
            return (
                '"'
                + "".join(
                    c if c.isalnum() else "".join(f"\\{b:03o}" for b in [ord(c)]) if ord(c) < 256 else c for c in item
                )
                + '"'
            )
        return str(item)

    if listed:
        return " ".join(f"{name}: [{', '.join(map(value, values))}]" for name, values in message.items())
    return "\n".join(f"{name}: {value(item)}" for name, values in message.items() for item in values)


@given(messages, st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(message: dict[str, list[Any]], listed: bool) -> None:
    assert parse(_written(message, listed)) == message


def test_versions_are_chosen_by_number() -> None:
    present = ("1", "2", "9", "10")
    assert VersionPolicy().choose(present) == ("10",)
    assert VersionPolicy("latest", 2).choose(present) == ("9", "10")
    assert VersionPolicy("all").choose(present) == present
    assert VersionPolicy("specific", 1, (2, 77)).choose(present) == ("2",)


@pytest.mark.parametrize(
    "data",
    [
        {"bakend": "cpu"},
        {"replicas": 0},
        {"replicas": "2"},
        {"replicas": True},
        {"pinned": 1},
        {"isolation": "thread"},
        {"batch_sizes": [1, "8"]},
        {"latency_target_ms": 0},
        {"timeout_ms": -1},
        {"max_queue": 0},
        {"options": []},
    ],
)
def test_settings_that_are_wrong_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        settings_from(data)


def test_a_models_settings_go_before_the_servers() -> None:
    server = ModelSettings(max_batch_size=4, isolation="process", latency_target_ms=5)
    both = merged(settings_from({"max_batch_size": 1, "isolation": "none", "latency_target_ms": 2}), server)
    assert (both.max_batch_size, both.isolation, both.latency_target_ms) == (1, "none", 2)
    assert merged(ModelSettings(), server) == server


def test_service_settings_are_checked(tmp_path: Any) -> None:
    for wrong in (
        {"repository": ()},
        {"control": "auto"},
        {"poll_s": 0},
        {"max_resident_models": 0},
        {"load_models": ("a",)},
    ):
        with pytest.raises(OptionError):
            ServiceSettings(**{"repository": (tmp_path,), **wrong})
