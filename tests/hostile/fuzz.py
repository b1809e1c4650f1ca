"""Requests that nobody meant: for each seed the same ones. Each is one function of a random generator."""

from __future__ import annotations

import copy
import gzip
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.serve.serve_client import post

from accelrt.protocol.messages import message
from accelrt.protocol.wire import write_request

Random = random.Random

_SIZES = (
    -(2**63),
    -(2**31),
    -1,
    0,
    1,
    2,
    15,
    16,
    17,
    63,
    64,
    65,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**40,
)
_TEXTS = (
    "",
    "x",
    "y",
    "three",
    "FP32",
    "\x00",
    "\ud800",
    "é",
    "𝄞" * 50,
    "a" * 5000,
    "../../etc/passwd",
    "%00",
    "NaN",
    "{}",
    "\r\n",
    "0x10",
)
_WORDS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "01",
    "1.",
    "nul",
    "tru",
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\u12",
    "\ufeff",
)
_TYPES = ("FP32", "FP16", "FP64", "BF16", "INT8", "INT64", "UINT64", "BOOL", "BYTES", "FP8", "", "fp32", 7, None)
_MODELS = ("three", "three", "three", "text", "apart", "nothing")


def value(rng: Random) -> Any:
    """Anything that JSON can say."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(_SIZES)
    if kind == 1:
        return rng.choice(_TEXTS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return rng.choice((0.5, -1e308, 1e-320, float("nan"), float("inf")))
    if kind == 4:
        return [value(rng) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(_TEXTS[:8]): value(rng) for _ in range(rng.randrange(3))}
    if kind == 6:
        deep: Any = 1
        for _ in range(rng.choice((3, 60, 70, 200))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 7:
        return [rng.choice(_SIZES) for _ in range(rng.randrange(6))]
    if kind == 8:
        return rng.choice(_TYPES)
    return [[1.5] * rng.randrange(20)] * rng.randrange(4)


def document(rng: Random) -> dict[str, Any]:
    """A correct request."""
    tensor = {"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [float(rng.randrange(99))] * 16}
    found: dict[str, Any] = {"id": str(rng.randrange(10**6)), "inputs": [tensor]}
    if rng.random() < 0.3:
        found["outputs"] = [{"name": "y", "parameters": {"binary_data": rng.random() < 0.5}}]
    if rng.random() < 0.3:
        found["parameters"] = {
            "priority": rng.randrange(3),
            "timeout": rng.randrange(10**6),
            "binary_data_output": True,
        }
    return found


def changed(rng: Random, document: Any) -> Any:
    """Replace, remove, repeat or wrap something, somewhere."""
    found = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at: Any = found
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.75:
                at = at[key]
                continue
            doing = rng.randrange(5)
            if doing == 0:
                del at[key]
            elif doing == 1:
                at[key] = [at[key]]
            elif doing == 2 and isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
            elif doing == 3 and isinstance(at, dict):
                at[
                    rng.choice(("shared_memory_region", "binary_data_size", "classification", "parameters", *_TEXTS))
                ] = value(rng)
            else:
                at[key] = value(rng)
            break
    return found


def text_of(rng: Random, document: Any) -> bytes:
    """Write JSON, now and then not quite."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    doing = rng.randrange(12)
    if doing == 0 and len(text) > 2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(_WORDS) + text[at + rng.randrange(3) :]
    elif doing == 1:
        text = text[: rng.randrange(len(text) + 1)]
    elif doing == 2:
        text = text.replace('"inputs"', f'"inputs": {json.dumps(value(rng))}, "inputs"', 1)
    elif doing == 3:
        text = text.replace("16", rng.choice(("1e1", "16.0", "1" * 400, "-16", "1E400", "0")), 1)
    elif doing == 4:
        depth = rng.choice((64, 65, 1000, 50_000))
        text = "[" * depth + text + "]" * rng.choice((depth, 0))
    data = text.encode("utf-8", "surrogatepass")
    if doing == 5 and data:
        spoilt = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        data = bytes(spoilt)
    return data


def _target(rng: Random) -> str:
    name = rng.choice(_MODELS)
    return (
        f"/v2/models/{name}/infer"
        if rng.random() < 0.8
        else f"/v2/models/{name}/versions/{rng.choice((1, 2, 0, 'x'))}/infer"
    )


def http_json(rng: Random) -> bytes:
    """JSON that is no request, in one way or another."""
    base = document(rng)
    found = changed(rng, base) if rng.random() < 0.85 else value(rng)
    return post(_target(rng), text_of(rng, found))


def http_compressed(rng: Random) -> bytes:
    """A body that says it is compressed."""
    data = text_of(rng, changed(rng, document(rng)))
    name, write = rng.choice((("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes), ("br", bytes)))
    data = write(data)
    if rng.random() < 0.3 and data:
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        data = bytes(spoilt)[: rng.choice((len(data), len(data) // 2))]
    return post(
        _target(rng), data, f"Content-Encoding: {name}", f"Accept-Encoding: {rng.choice(('gzip', 'deflate;q=0', '*'))}"
    )


def http_binary(rng: Random) -> bytes:
    """Tensors as bytes, whose head lies: of its own length, of theirs, of their shape and type."""
    raw = struct.pack("<16f", *[float(rng.randrange(9))] * 16)
    size: Any = rng.choice((64, 64, 64, value(rng), rng.choice(_SIZES)))
    shape: Any = rng.choice(
        ([1, 16], [1, 16], [16], [rng.choice(_SIZES), 16], [rng.choice(_SIZES), rng.choice(_SIZES)], value(rng))
    )
    tensor = {"name": "x", "shape": shape, "datatype": rng.choice(_TYPES), "parameters": {"binary_data_size": size}}
    found: Any = {"inputs": [tensor] * rng.choice((1, 1, 1, 2))}
    if rng.random() < 0.3:
        found = changed(rng, found)
    head = text_of(rng, found)
    told = rng.choice(
        (str(len(head)),) * 4
        + (
            str(len(head) + rng.choice((-1, 1, 64, 1000))),
            str(rng.choice(_SIZES)),
            "",
            "x",
            "1e2",
            "٣",
            "0",
            " 5 ",
            "0x5",
        )
    )
    body = head + raw * rng.choice((1, 1, 1, 0, 2)) + bytes(rng.randrange(256) for _ in range(rng.choice((0, 0, 3))))
    return post(_target(rng), body, f"Inference-Header-Content-Length: {told}")


def http_raw(rng: Random) -> bytes:
    """A raw binary request: no JSON at all."""
    return post(_target(rng), bytes(rng.choice((0, 1, 63, 64, 65, 128, 4096))), "Inference-Header-Content-Length: 0")


def http_memory(rng: Random) -> bytes:
    """Shared memory: registrations, and tensors that lie there."""
    name = rng.choice(("a", "b", "..%2Fx", "é", "a" * 300))
    if rng.random() < 0.6:
        given = {
            "key": rng.choice(("/nothing", "../../etc/passwd", "", "/", "a/b", value(rng))),
            "offset": rng.choice((0, 0, value(rng))),
            "byte_size": rng.choice((64, rng.choice(_SIZES), value(rng))),
        }
        verb = rng.choice(("register", "unregister", "status"))
        kind = rng.choice(("systemsharedmemory", "cudasharedmemory"))
        return post(f"/v2/{kind}/region/{name.replace('é', '%C3%A9')}/{verb}", text_of(rng, given))
    place = {
        "shared_memory_region": rng.choice(("a", "b", value(rng))),
        "shared_memory_byte_size": rng.choice((64, value(rng))),
        "shared_memory_offset": rng.choice((0, value(rng))),
    }
    tensor = {"name": "x", "shape": [1, 16], "datatype": "FP32", "parameters": place}
    return post(
        _target(rng),
        text_of(rng, {"inputs": [tensor], "outputs": [{"name": "y", "parameters": rng.choice((place, {}))}]}),
    )


def http_control(rng: Random) -> bytes:
    """The other routes: loads with files and configurations, index, unload."""
    name = rng.choice(("nothing", "a%2F..%2Fb", "%00", "x" * 300, "."))
    parameters: Any = {
        "config": rng.choice((json.dumps({"name": "nothing", "max_batch_size": rng.choice(_SIZES)}), value(rng))),
        rng.choice(("file:1/model.onnx", "file:../x", "file:1/../../x", "file:0/a", "file:1/", "other")): rng.choice(
            ("AAAA", "====", "é", value(rng))
        ),
    }
    body = text_of(rng, changed(rng, {"parameters": parameters}))
    verb = rng.choice((f"models/{name}/load", f"models/{name}/unload", "index"))
    return post(f"/v2/repository/{verb}", body)


def framing(rng: Random) -> bytes:
    """Bytes that are HTTP only nearly; sent on a connection of their own, which is closed behind them."""
    good = post("/v2/models/three/infer", json.dumps(document(rng)).encode())
    doing = rng.randrange(9)
    if doing == 0:
        size = rng.choice((-1, 0, 1, len(good), 2**31, 2**63, 2**64, "x", "1 2", "+5", "0x10"))
        return good.replace(b"Content-Length: ", f"Content-Length: {size}\r\nX: ".encode())
    if doing == 1:
        body = json.dumps(document(rng)).encode()
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
        if rng.random() < 0.7:
            at = rng.randrange(len(chunks))
            chunks = chunks[:at] + rng.choice((b"ffffffffffffffff\r\n", b"-1\r\n", b";x=y", b"\n", b"zz")) + chunks[at:]
        also = rng.choice((b"", b"Content-Length: 5\r\n"))
        return (
            b"POST /v2/models/three/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
            + also
            + b"\r\n"
            + chunks
        )
    if doing == 2:
        return good * rng.randrange(2, 20) + rng.choice((b"", b"GARBAGE\r\n\r\n", good[:-5]))
    if doing == 3:
        header = rng.choice(
            (
                b"X: a\rb",
                b"X : 1",
                b": 1",
                b"X\x00: 1",
                b"X: \xff\xfe",
                b" folded",
                b"Host: b",
                b"X: " + b"a" * 40000,
                b"\r\n".join(b"X%d: 1" % n for n in range(150)),
            )
        )
        return good.replace(b"Host: localhost", header)
    if doing == 4:
        spoilt = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            spoilt[rng.randrange(min(len(spoilt), 90))] = rng.randrange(256)
        return bytes(spoilt)
    if doing == 5:
        return good[: rng.randrange(len(good))]
    if doing == 6:
        line = rng.choice((b"GET", b"PUT", b"CONNECT", b"TRACE", b"PRI", b"HEAD", b"\x16\x03\x01", b"post"))
        return line + good[4:]
    if doing == 7:
        extra = rng.choice(
            (
                b"Upgrade: h2c\r\nConnection: Upgrade",
                b"Expect: 100-continue",
                b"Expect: 200",
                b"Connection: close",
                b"Connection: x, y",
                b"Transfer-Encoding: gzip, chunked",
                b"Transfer-Encoding: identity",
            )
        )
        return good.replace(b"Host: localhost", extra)
    path = rng.choice(
        (
            b"/" + b"a" * 40000,
            b"*",
            b"http://x/v2",
            b"//v2/models/three/infer",
            b"/v2/models/%2e%2e/infer",
            b"/v2/models/\xff/infer",
            b"/v2/models/three/infer?" + b"a" * 1000,
            b"/v2/models/three//infer",
        )
    )
    return good.replace(b"/v2/models/three/infer", path)


WELL_FRAMED: tuple[Callable[[Random], bytes], ...] = (
    http_json,
    http_json,
    http_json,
    http_binary,
    http_binary,
    http_compressed,
    http_raw,
    http_memory,
    http_control,
)


# protobuf


def rpc(rng: Random) -> tuple[str, bytes]:
    """A method, and the bytes of a request for it."""
    if rng.random() < 0.85:
        return "ModelInfer", infer(rng)
    name = rng.choice(
        (
            "ModelMetadata",
            "ModelConfig",
            "ModelStatistics",
            "ModelReady",
            "RepositoryIndex",
            "RepositoryModelLoad",
            "RepositoryModelUnload",
            "SystemSharedMemoryRegister",
            "SystemSharedMemoryUnregister",
            "SystemSharedMemoryStatus",
            "CudaSharedMemoryRegister",
            "TraceSetting",
            "LogSettings",
        )
    )
    if name == "SystemSharedMemoryRegister":
        request = message("SystemSharedMemoryRegisterRequest")(
            name=rng.choice("ab"),
            key=rng.choice(("/nothing", "../x", "", "/")),
            offset=rng.choice((0, 2**63, 2**64 - 1)),
            byte_size=rng.choice((0, 64, 2**62, 2**64 - 1)),
        )
        return name, spoilt(rng, request.SerializeToString())
    if name == "RepositoryModelLoad":
        request = message("RepositoryModelLoadRequest")(model_name=rng.choice(("nothing", "../x", "")))
        request.parameters[rng.choice(("config", "file:1/model.onnx", "file:../x", "other"))].bytes_param = b"\x08\x07"
        return name, spoilt(rng, request.SerializeToString())
    return name, bytes(rng.randrange(256) for _ in range(rng.randrange(24)))


def infer(rng: Random) -> bytes:
    """A ModelInfer request that lies, or whose bytes were spoilt."""
    if rng.random() < 0.3:
        return spoilt(rng, write_request(rng.choice(_MODELS), "", {"x": np.full((1, 16), 1, np.float32)}, id="1"))
    request = message("ModelInferRequest")(
        model_name=rng.choice(_MODELS),
        model_version=rng.choice(("", "", "1", "2", "x")),
        id=rng.choice(("", "7", "é" * 100)),
    )
    for _ in range(rng.choice((1, 1, 1, 0, 2))):
        tensor = request.inputs.add(name=rng.choice(("x", "x", "x", "y", "")), datatype=str(rng.choice(_TYPES)))
        tensor.shape.extend(
            rng.choice(([1, 16], [1, 16], [16], [], [-1, 16], [2**62, 4], [2**31, 2**31, 2**31], [0, 16], [1] * 100))
        )
        kind = rng.randrange(6)
        if kind == 0:
            tensor.contents.fp32_contents.extend([1.0] * rng.choice((16, 15, 0)))
        elif kind == 1:
            tensor.contents.int64_contents.extend([2**62] * 16)
        elif kind == 2:
            tensor.contents.bytes_contents.extend([b"\xff"] * 16)
        elif kind == 3:
            tensor.parameters["shared_memory_region"].string_param = rng.choice(("a", ""))
            tensor.parameters["shared_memory_byte_size"].int64_param = rng.choice((64, -1, 2**62))
            tensor.parameters["shared_memory_offset"].int64_param = rng.choice((0, -1, 2**62))
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        request.raw_input_contents.append(bytes(rng.choice((64, 64, 63, 0, 4, 128))))
    for _ in range(rng.choice((0, 0, 1, 3))):
        asked = request.outputs.add(name=rng.choice(("y", "z", "")))
        if rng.random() < 0.3:
            asked.parameters[rng.choice(("classification", "shared_memory_region", "x"))].int64_param = 3
    if rng.random() < 0.3:
        request.parameters[rng.choice(("priority", "timeout", "sequence_id", "x"))].int64_param = rng.choice(
            (-1, 0, 2**62)
        )
    if rng.random() < 0.1:
        request.parameters[rng.choice(("priority", "timeout"))].string_param = rng.choice(_TEXTS[:5])
    data: bytes = request.SerializeToString()
    return spoilt(rng, data) if rng.random() < 0.2 else data


def spoilt(rng: Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    if not data:
        return b"\xff"
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 6))):
        doing, at = rng.randrange(5), rng.randrange(len(found)) if found else 0
        if doing == 0 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif doing == 1:
            del found[at:]
        elif doing == 2:
            found[at:at] = found[max(0, at - 8) : at + 8]
        elif doing == 3:
            found[at:at] = rng.choice(
                (b"\xff" * 10, b"\x80" * 11, b"\x0b", b"\x0c", b"\x3a\xff\xff\xff\xff\x0f", b"\x00")
            )
        elif found:
            found[at] = rng.randrange(256)
    return bytes(found)
