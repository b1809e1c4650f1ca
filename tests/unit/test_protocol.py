"""The wire format against protobuf's own classes, and against bytes that nobody meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

pytest.importorskip("google.protobuf")

from accelrt import errors
from accelrt.errors import AccelrtError, RequestError
from accelrt.graph.types import numpy_dtype
from accelrt.protocol.datatypes import DTYPES, TYPED, datatype_of, from_contents, from_raw, to_contents, to_raw
from accelrt.protocol.faults import code_of, error_of
from accelrt.protocol.messages import message
from accelrt.protocol.wire import read_request, read_response, write_request, write_response, write_stream_response

PARAMETERS = st.dictionaries(
    st.text(max_size=8),
    st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=20)),
    max_size=3,
)
NUMBERS = st.sampled_from([d for d in DTYPES.values() if d not in ("string", "bfloat16")])
ARRAYS = NUMBERS.flatmap(lambda d: npst.arrays(np.dtype(d), npst.array_shapes(min_dims=0, max_dims=4, min_side=0)))


def _plain(parameters: Any) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in parameters.items()}


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=20),
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=10), ARRAYS, max_size=3),
    PARAMETERS,
    st.lists(st.tuples(st.text(max_size=5), PARAMETERS), max_size=3),
    st.text(max_size=40),
)
def test_requests_are_what_protobuf_writes_and_reads(
    name: str, version: str, inputs: dict[str, Any], parameters: Any, outputs: Any, id_: str
) -> None:
    data = write_request(name, version, inputs, outputs=outputs, parameters=parameters, id=id_)
    theirs = message("ModelInferRequest").FromString(data)
    assert (theirs.model_name, theirs.model_version, theirs.id) == (name, version, id_)
    assert _plain(theirs.parameters) == parameters
    assert [(one.name, _plain(one.parameters)) for one in theirs.outputs] == outputs
    assert [one.name for one in theirs.inputs] == list(inputs)
    assert [tuple(one.shape) for one in theirs.inputs] == [array.shape for array in inputs.values()]
    assert list(theirs.raw_input_contents) == [array.tobytes() for array in inputs.values()]
    for serialised in (data, theirs.SerializeToString()):
        ours = read_request(serialised)
        assert (ours.model_name, ours.model_version, ours.id) == (name, version, id_)
        assert ours.parameters == parameters
        assert ours.asked == outputs
        for tensor, raw, (key, array) in zip(ours.tensors, ours.raw, inputs.items(), strict=True):
            found = from_raw(tensor.name, tensor.datatype, tensor.shape, raw)
            assert (tensor.name, found.dtype, found.shape) == (key, array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
            assert found.flags.aligned


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=10), ARRAYS, max_size=3), PARAMETERS, st.booleans())
def test_responses_are_what_protobuf_reads(outputs: dict[str, Any], parameters: Any, typed: bool) -> None:
    typed = typed and all(datatype_of(array) in TYPED for array in outputs.values())
    contents = {name: to_contents(array) for name, array in outputs.items()} if typed else None
    parts = write_response("m", "1", outputs, typed=contents, parameters=parameters, id="i")
    theirs = message("ModelInferResponse").FromString(b"".join(parts))
    assert _plain(theirs.parameters) == parameters
    assert len(theirs.raw_output_contents) == (0 if typed else len(outputs))
    ours = read_response(b"".join(parts))
    raw = iter(ours.raw)
    for tensor, (name, array) in zip(ours.tensors, outputs.items(), strict=True):
        if typed:
            assert tensor.contents is not None
            found = from_contents(name, tensor.datatype, tensor.shape, tensor.contents)
        else:
            found = from_raw(name, tensor.datatype, tensor.shape, next(raw))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    streamed = message("ModelStreamInferResponse").FromString(write_stream_response(parts, "oh"))
    assert streamed.error_message == "oh"
    assert streamed.infer_response == theirs


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for read in (read_request, read_response):
        try:
            read(data)
        except RequestError:
            continue


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_message_with_bytes_changed_is_a_message_or_refused(data: st.DataObject) -> None:
    whole = bytearray(
        write_request("model", "1", {"x": np.arange(6.0), "y": np.array([b"a", b"bc"], object)}, parameters={"p": 1.5})
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_request(bytes(whole))
        for tensor, raw in zip(found.tensors, found.raw, strict=False):
            from_raw(tensor.name, tensor.datatype, tensor.shape, raw)
    except RequestError:
        pass


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_texts(texts: list[bytes]) -> None:
    array = np.empty(len(texts), object)
    array[:] = texts
    raw = memoryview(bytes(to_raw(array)))
    assert from_raw("x", "BYTES", array.shape, raw).tolist() == texts
    if texts:
        with pytest.raises(RequestError):
            from_raw("x", "BYTES", array.shape, raw[:-1])


def test_bfloat16_and_bytes_that_are_no_bool() -> None:
    array = np.arange(6).astype(numpy_dtype("bfloat16")).reshape(2, 3)
    assert from_raw("x", "BF16", (2, 3), memoryview(to_raw(array))).tobytes() == array.tobytes()  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="neither 0 nor 1"):  # it would be a bool that is neither true nor false
        from_raw("x", "BOOL", (3,), memoryview(b"\x00\x01\x07"))
    with pytest.raises(RequestError, match="complex64"):
        to_raw(np.zeros(1, np.complex64))


@given(
    arrays=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_what_is_remembered_of_a_message_is_what_would_be_read_again(
    arrays: list[int], changes: list[tuple[float, int]]
) -> None:
    from accelrt.protocol import wire

    data = write_request("m", "1", {f"x{at}": np.arange(size, dtype=np.uint8) for at, size in enumerate(arrays)})
    read_request(data)
    other = bytearray(data)
    for place, value in changes:
        other[int(place * len(other))] = value

    def outcome() -> Any:
        try:
            found = read_request(bytes(other))
        except RequestError as error:
            return error.message
        return replace(found, raw=[bytes(each) for each in found.raw])

    remembered = outcome()
    wire._remembered.clear()
    assert remembered == outcome()


def test_messages_that_differ_in_their_tensors_are_not_taken_apart_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt.protocol import wire

    read_request(write_request("m", "", {"x": np.zeros(400)}))
    monkeypatch.setattr(wire, "_fields", None)
    found = read_request(write_request("m", "", {"x": np.ones(400)}))
    assert found.model_name == "m" and bytes(found.raw[0]) == np.ones(400).tobytes()


def test_errors_come_back_as_they_went() -> None:
    for kind in (
        errors.RequestError,
        errors.RequestTooLarge,
        errors.InputError,
        errors.ModelNotFound,
        errors.ModelUnavailable,
        errors.Overloaded,
        errors.NotAllowed,
        errors.RequestTimeout,
    ):
        sent = kind("what was said")
        found = error_of(code_of(sent), str(sent), type(sent).__name__)
        assert type(found) is kind
        assert found.message == "what was said"
    assert code_of(errors.ExecutionError("x")) == "INTERNAL"
    assert type(error_of("INTERNAL", "x", "ExecutionError")) is errors.ServingError
    assert isinstance(error_of("NOT_FOUND", ""), AccelrtError)
    assert type(error_of("NOT_FOUND", "x", "SystemExit")) is errors.ModelNotFound


@pytest.mark.parametrize("name", ["m", "mo", "mod", "mode", "a-model-of-another-name"])
def test_large_tensors_lie_aligned_in_a_request(name: str) -> None:
    inputs = {"flag": np.ones(3, bool), "x": np.arange(5000.0), "y": np.arange(9000, dtype=np.float32)}
    data = write_request(name, "", inputs)
    ours = read_request(data)
    for raw, (key, array) in zip(ours.raw, inputs.items(), strict=True):
        found = np.frombuffer(raw, array.dtype)
        np.testing.assert_array_equal(found, array)
        assert key == "flag" or found.flags.aligned
    theirs = message("ModelInferRequest").FromString(data)
    assert list(theirs.raw_input_contents) == [array.tobytes() for array in inputs.values()]


def test_an_array_keeps_the_view_that_it_was_made_of() -> None:
    """Memory that is used again for the next request is free when no view of it is left: an array is to count as one."""
    memory = bytearray(64)
    array = from_raw("x", "FP32", [4], memoryview(memory)[:16])
    with pytest.raises(BufferError):
        memory.append(0)
    del array
    memory.append(0)
