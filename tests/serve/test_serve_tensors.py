"""Tensors of the protocol: round trips, and what a client may lie about."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from accelrt.errors import AccelrtError, RequestError, ServingError
from accelrt.protocol.datatypes import DTYPES, datatype_of, dtype_of, from_raw, to_raw
from accelrt.serve import tensors
from accelrt.serve.tensors import from_json, to_json

NUMERIC = sorted(set(DTYPES) - {"BYTES"})
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def _random(datatype: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Any bits at all, NaN and infinities among them."""
    dtype, rng = dtype_of(datatype), np.random.default_rng(seed)
    if datatype == "BOOL":
        return rng.random(shape) < 0.5
    count = int(np.prod(shape, dtype=int))
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape) if count else np.empty(shape, dtype)


def _texts(items: list[bytes], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


@given(st.sampled_from(NUMERIC), SHAPES, st.integers(0, 2**32), st.integers(0, 9))
def test_numbers_survive_raw(datatype: str, shape: tuple[int, ...], seed: int, offset: int) -> None:
    array = _random(datatype, shape, seed)
    raw = bytes(to_raw(array))
    body = b"#" * offset + raw + b"rest"
    back = from_raw("x", datatype, list(shape), body, offset, len(raw))
    assert back.dtype == dtype_of(datatype) and back.shape == shape and back.tobytes() == array.tobytes()
    assert back.flags.aligned and back.flags.c_contiguous
    assert datatype_of(back) == datatype


@given(SHAPES, st.data())
def test_bytes_survive_raw(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = int(np.prod(shape, dtype=int))
    items = data.draw(st.lists(st.binary(max_size=20), min_size=count, max_size=count))
    array = _texts(items, shape)
    back = from_raw("x", "BYTES", shape, bytes(to_raw(array)))
    assert back.shape == shape and back.reshape(-1).tolist() == items


@given(st.sampled_from(sorted(set(NUMERIC) - tensors.BINARY_ONLY)), SHAPES, st.integers(0, 2**32), st.booleans())
def test_numbers_survive_json(datatype: str, shape: tuple[int, ...], seed: int, nested: bool) -> None:
    array = _random(datatype, shape, seed)
    flat = orjson.loads(orjson.dumps(to_json("x", array), option=orjson.OPT_SERIALIZE_NUMPY))
    assert isinstance(flat, list) and len(flat) == array.size
    items = _texts(flat, shape).tolist() if nested else flat
    back = from_json("x", datatype, shape, json.dumps(items).encode())
    assert back.dtype == array.dtype and back.shape == shape
    if array.dtype.kind == "f":
        np.testing.assert_array_equal(back, array)  # any NaN is as good as another
    else:
        assert back.tobytes() == array.tobytes()


@given(SHAPES, st.data(), st.booleans())
def test_text_survives_json(shape: tuple[int, ...], data: st.DataObject, nested: bool) -> None:
    count = int(np.prod(shape, dtype=int))
    items = data.draw(st.lists(st.text(max_size=10).filter(_is_utf8), min_size=count, max_size=count))
    array = _texts([item.encode() for item in items], shape)
    assert to_json("x", array) == items
    given_ = _texts(items, shape).tolist() if nested else items
    back = from_json("x", "BYTES", shape, json.dumps(given_).encode())
    assert back.shape == shape and back.reshape(-1).tolist() == array.reshape(-1).tolist()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def test_raw_numbers_are_views_where_they_lie() -> None:
    body = np.arange(4, dtype=np.float32).tobytes()
    array = from_raw("x", "FP32", [4], body)
    assert not array.flags.owndata and not array.flags.writeable
    unaligned = from_raw("x", "FP32", [4], b"#" + body, 1)
    assert unaligned.flags.aligned and unaligned.tolist() == [0, 1, 2, 3]
    assert isinstance(to_raw(array), memoryview)


def test_raw_of_what_is_not_in_order() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert from_raw("x", "INT32", [3, 2], to_raw(array)).tolist() == array.tolist()


RAW_LIES = [
    ("FP32", [2, 2], bytes(15)),
    ("FP32", [2, 2], bytes(17)),
    ("FP32", [-1, -4], bytes(16)),
    ("FP32", [-1], bytes(4)),
    ("FP32", [2**32, 2**32], bytes(0)),
    ("FP32", [2**62, 4], bytes(0)),
    ("FP32", [0, 2**62, 2**62], b""),
    ("FP32", [1] * 33, bytes(4)),
    ("FP32", [10**40], b""),
    ("FP31", [1], bytes(4)),
    ("float32", [1], bytes(4)),
    ("", [1], bytes(4)),
    ("BOOL", [2], b"\x00\x02"),
    ("BYTES", [1], b""),
    ("BYTES", [1], b"\x01\x00"),
    ("BYTES", [1], b"\x05\x00\x00\x00ab"),
    ("BYTES", [1], b"\xff\xff\xff\xff"),
    ("BYTES", [1], b"\x01\x00\x00\x00ab"),
    ("BYTES", [2], b"\x04\x00\x00\x00abcd"),
    ("BYTES", [2**61], bytes(64)),
    ("BYTES", [0], b"x"),
]


@pytest.mark.parametrize(("datatype", "shape", "raw"), RAW_LIES, ids=str)
def test_lies_about_raw_bytes_are_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    with pytest.raises(RequestError):
        from_raw("x", datatype, shape, raw)


@pytest.mark.parametrize(("offset", "size"), [(0, 5), (5, None), (4, 4), (0, -4), (2, 4)])
def test_lies_about_places_are_refused(offset: int, size: int | None) -> None:
    with pytest.raises(RequestError):
        from_raw("x", "FP32", [1], bytes(4), offset, size)


JSON_LIES = [
    ("FP32", [2, 2], "[1,2,3]"),
    ("FP32", [2, 2], "[1,2,3,4,5]"),
    ("FP32", [2, 2], "[[1,2],[3]]"),
    ("FP32", [2, 2], "[[1,2,3,4]]"),
    ("FP32", [4], "[[1,2],[3,4]]"),
    ("FP32", [1], '{"a":1}'),
    ("FP32", [1], "[null]"),
    ("FP32", [1], "[true]"),
    ("FP32", [1], '["1"]'),
    ("FP32", [1], '["nan"]'),
    ("FP32", [1], "[1e39]"),
    ("FP64", [1], "[1e999]"),
    ("INT8", [1], "[128]"),
    ("INT8", [1], "[-129]"),
    ("UINT8", [1], "[256]"),
    ("UINT8", [1], "[-1]"),
    ("INT32", [1], "[1.5]"),
    ("INT32", [1], "[2147483648]"),
    ("INT64", [1], "[9223372036854775808]"),
    ("UINT64", [1], "[18446744073709551616]"),
    ("UINT64", [1], "[-1]"),
    ("BOOL", [1], "[1]"),
    ("BOOL", [1], '["true"]'),
    ("BYTES", [1], "[1]"),
    ("BYTES", [2, 2], '[["a","b"],["c"]]'),
    ("BYTES", [1], '["\\ud800"]'),
    ("FP16", [1], "[1]"),
    ("BF16", [1], "[1]"),
    ("FP32", [1], ""),
    ("FP32", [1], "["),
    ("FP32", [1], "[1] 2"),
    ("FP32", [1], "[" * 40 + "1" + "]" * 40),
    ("FP32", [-1], "[1]"),
    ("FP32", [2**63, 2], "[1]"),
]


@pytest.mark.parametrize(("datatype", "shape", "text"), JSON_LIES, ids=str)
def test_lies_in_json_are_refused(datatype: str, shape: list[int], text: str) -> None:
    with pytest.raises(RequestError):
        from_json("x", datatype, shape, text.encode())


@settings(max_examples=300)
@given(
    st.sampled_from(list(DTYPES)),
    st.none() | st.just([1]),
    st.binary(max_size=20),
    st.sampled_from([b"%b", b"[%b]", b'["%b"]', b'[["%b"]]']),
)
def test_whatever_bytes_stand_for_json(datatype: str, shape: list[int] | None, text: bytes, frame: bytes) -> None:
    with contextlib.suppress(RequestError):
        from_json("x", datatype, shape, frame % text)


def test_json_numbers_that_are_none_have_names() -> None:
    array = np.array([0.1, np.nan, np.inf, -np.inf], np.float32)
    written = orjson.dumps(to_json("x", array))
    assert written == b'[0.1,"NaN","Infinity","-Infinity"]'
    np.testing.assert_array_equal(from_json("x", "FP32", [4], written), array)


def test_json_without_a_shape_has_its_own() -> None:
    assert from_json("x", "INT32", None, b" [[1,2],[3,4]]").tolist() == [[1, 2], [3, 4]]
    assert from_json("x", "BYTES", None, b'[["a"],["b"]]').shape == (2, 1)
    assert from_json("x", "FP32", None, b"2").shape == ()
    for ragged in (b"[[1],[2,3]]", b"[1,[2]]"):
        with pytest.raises(RequestError):
            from_json("x", "FP32", None, ragged)


def test_scalars() -> None:
    assert from_json("x", "FP32", [], b"5").shape == from_json("x", "FP32", [], b"[5]").shape == ()
    assert from_raw("x", "INT16", [], struct.pack("<h", -3)).item() == -3


def test_types_without_a_datatype() -> None:
    for array in (np.zeros(1, np.complex64), np.zeros(1, ml_dtypes.float8_e4m3fn), np.zeros(1, ml_dtypes.int4)):
        with pytest.raises(RequestError, match="no datatype"):
            datatype_of(array)
    assert datatype_of(np.array(["a"])) == datatype_of(np.array(["a"], object)) == "BYTES"


def test_outputs_without_json_say_so() -> None:
    with pytest.raises(RequestError, match="binary_data"):
        to_json("y", np.zeros(1, np.float16))
    with pytest.raises(RequestError, match="UTF-8"):
        to_json("y", _texts([b"\xff"], (1,)))
    with pytest.raises(ServingError):
        to_raw(_texts([3], (1,)))  # type: ignore[list-item]


@settings(max_examples=300)
@given(
    st.sampled_from([*DTYPES, "FP8", "x" * 1000]),
    st.lists(st.integers(-3, 5) | st.integers(-(2**70), 2**70), max_size=5),
    st.binary(max_size=64),
    st.integers(-5, 70),
    st.none() | st.integers(-5, 70),
)
def test_whatever_a_client_says_is_an_array_or_an_error(
    datatype: str, shape: list[int], raw: bytes, offset: int, size: int | None
) -> None:
    try:
        array = from_raw("x", datatype, shape, raw, max(offset, 0), size)
    except AccelrtError as error:
        assert isinstance(error, RequestError) and len(str(error)) < 600
    else:
        assert list(array.shape) == shape


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
)


@settings(max_examples=300)
@given(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=4) | st.none(), JSON_VALUES)
def test_whatever_json_a_client_sends_is_an_array_or_an_error(
    datatype: str, shape: list[int] | None, value: Any
) -> None:
    try:
        array = from_json("x", datatype, shape, json.dumps(value).encode())
    except RequestError:
        return
    assert array.dtype == dtype_of(datatype) and (shape is None or list(array.shape) == shape)
