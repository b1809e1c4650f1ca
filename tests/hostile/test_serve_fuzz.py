"""Mutated requests by the thousand: no 500, no crash, no growth, and whoever asks correctly in between is answered right."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc
from tests.hostile import fuzz
from tests.hostile.faults import Server, put
from tests.serve.serve_client import Raw, post
from tests.serve.served_models import identity

from accelrt.protocol.messages import METHODS, message
from accelrt.protocol.wire import read_response, write_request

SHORT = pytest.param(0.03, id="short")
LONG = pytest.param(1.0, marks=pytest.mark.suite, id="long")
HTTP, FRAMING, RPC, STREAMS = 55_000, 12_000, 30_000, 3_000
"""With the frames of streams they are 10^5."""
MOST_GROWTH = 32 << 20
MISTAKES = {"INTERNAL", "UNKNOWN"}
"""What gRPC calls a server's own mistakes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("fuzz") / "root"
    put(root, "three")
    put(root, "apart", isolation="process")
    put(root, "text", identity("BYTES"))
    limits = {"body_bytes": 1 << 20, "header_s": 5.0, "body_s": 5.0}
    with Server(root, control_mode="explicit", load=["*"], limits=limits) as found:
        yield found
        assert found.process.poll() is None, found.log.read_text()[-3000:]


class Watch:
    """Says which request was wrong, keeps its bytes, looks at memory, and asks correctly in between."""

    def __init__(self, server: Server, folder: Path, name: str, total: int) -> None:
        self.server, self.folder, self.name, self.total = server, folder, name, total
        self.statuses: Counter[str] = Counter()
        self.start = time.monotonic()
        self.rss = 0

    def check(self, condition: bool, number: int, request: bytes, found: object) -> None:
        if not condition:
            path = self.folder / f"{self.name}-{number}.bin"
            path.write_bytes(request)
            log = self.server.log.read_text()[-2000:]
            pytest.fail(f"request {number} of {self.name}, kept in {path}, begins {request[:200]!r}: {found!r}\n{log}")

    def between(self, number: int) -> None:
        if number == self.total // 5:  # by then all that is kept on purpose is there
            self.rss = self.server.rss
        if number % 1000 == 0 or number == self.total - 1:
            self.ask(number)

    def ask(self, number: int) -> None:
        body = {"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [number] * 16}]}
        with Raw(self.server.http) as raw:
            raw.send(post("/v2/models/three/infer", json.dumps(body).encode()))
            answer = raw.answer()
        assert answer.status == 200 and answer.json["outputs"][0]["data"] == [3.0 * number] * 16, (number, answer.body)

    def end(self, record: Callable[[str, object], None]) -> None:
        grown = self.server.rss - self.rss
        row = (
            f"{self.name:9} {self.total:6} requests in {time.monotonic() - self.start:5.1f} s: "
            f"{dict(self.statuses.most_common())}; memory {self.rss >> 20} MiB after a fifth, "
            f"{self.server.rss >> 20} MiB at the end"
        )
        record("summary", row)
        assert grown < MOST_GROWTH, row
        assert not self.server.errors, self.server.errors[:3]


@pytest.mark.parametrize("share", [SHORT, LONG])
def test_well_framed_requests(server: Server, share: float, tmp_path: Path, record_property: Any) -> None:
    rng, total = random.Random(1), int(HTTP * share)
    watch = Watch(server, tmp_path, "http", total)
    raw: Raw | None = None
    for number in range(total):
        watch.between(number)
        request = rng.choice(fuzz.WELL_FRAMED)(rng)
        raw = raw or Raw(server.http, 30.0)
        with contextlib.suppress(OSError):  # refused before it was all sent; why is to be read
            raw.send(request)
        try:
            answer = raw.answer()
        except (OSError, EOFError) as error:
            watch.check(False, number, request, error)
            raise
        watch.statuses[str(answer.status)] += 1
        good = answer.status == 200 or (400 <= answer.status < 500 and bool(answer.json["error"]))
        # 503: a model that one of these unloaded; 501: shared memory, which is for gRPC alone; 504: it said how long it
        # would wait.
        good = good or answer.status in (501, 503) or (answer.status == 504 and b"timeout" in request)
        watch.check(good, number, request, (answer.status, answer.body[:500]))
        watch.check(not raw._rest, number, request, raw._rest)
        if answer.headers.get("connection") == "close":
            raw.close()
            raw = None
    watch.end(record_property)
    assert watch.statuses["200"] > total // 100 and watch.statuses["400"] > total // 5


@pytest.mark.parametrize("share", [SHORT, LONG])
def test_framing(server: Server, share: float, tmp_path: Path, record_property: Any) -> None:
    rng, total = random.Random(2), int(FRAMING * share)
    watch = Watch(server, tmp_path, "framing", total)
    for number in range(total):
        watch.between(number)
        request = fuzz.framing(rng)
        data = b""
        with socket.create_connection(("127.0.0.1", server.http), 20) as connection:
            try:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                while got := connection.recv(65536):
                    data += got
            except ConnectionError:
                pass
            except TimeoutError as error:
                watch.check(False, number, request, error)
        statuses = re.findall(rb"(?:^|\n|\}|\])HTTP/1\.1 (\d{3}) ", data)
        watch.check(not data or bool(statuses), number, request, data[:500])
        for status in statuses or [b"closed"]:
            watch.statuses[status.decode()] += 1
            watch.check(status != b"500", number, request, data[:500])
    watch.end(record_property)


@pytest.mark.parametrize("share", [SHORT, LONG])
def test_protobuf(server: Server, share: float, tmp_path: Path, record_property: Any) -> None:
    rng, total = random.Random(3), int(RPC * share)
    watch = Watch(server, tmp_path, "grpc", total)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        methods = {name: channel.unary_unary(method.path) for name, method in METHODS.items()}
        pending: list[tuple[int, bytes, Any]] = []

        def settle() -> None:
            for number, request, call in pending:
                code = call.code()
                watch.statuses[code.name] += 1
                watch.check(code.name not in MISTAKES, number, request, (code, call.details()))
                watch.check(code.name == "OK" or bool(call.details()), number, request, code)
            pending.clear()

        for number in range(total):
            watch.between(number)
            method, request = fuzz.rpc(rng)
            pending.append((number, request, methods[method].future(request, timeout=60)))
            if len(pending) == 50:
                settle()
        settle()
        right = read_response(methods["ModelInfer"](write_request("three", "", {"x": np.full((1, 16), 5, np.float32)})))
        np.testing.assert_array_equal(np.frombuffer(right.raw[0], np.float32), np.full(16, 15, np.float32))
    watch.end(record_property)
    assert watch.statuses["OK"] > total // 100 and watch.statuses["INVALID_ARGUMENT"] > total // 5


@pytest.mark.parametrize("share", [SHORT, LONG])
def test_streams(server: Server, share: float, tmp_path: Path, record_property: Any) -> None:
    rng, total = random.Random(4), int(STREAMS * share) // 10
    watch = Watch(server, tmp_path, "streams", total)
    good = write_request("three", "", {"x": np.full((1, 16), 5, np.float32)}, id="good")
    answered = message("ModelStreamInferResponse")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        for number in range(total):
            watch.between(number)
            frames = [fuzz.infer(rng) for _ in range(10)] + [good]
            answers = [answered.FromString(one) for one in stream(iter(frames), timeout=60)]
            watch.check(len(answers) == len(frames), number, b"".join(frames), len(answers))
            last = answers[-1].infer_response
            right = last.id == "good" and last.raw_output_contents[0] == np.full(16, 15, np.float32).tobytes()
            watch.check(right and not answers[-1].error_message, number, b"".join(frames), answers[-1])
            for one in answers[:-1]:
                watch.statuses["error" if one.error_message else "answer"] += 1
                own = "The server failed" not in one.error_message
                watch.check(own, number, b"".join(frames), one.error_message)
    watch.end(record_property)


# The control routes, by their own description


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "examples", [pytest.param(5, id="short"), pytest.param(100, marks=pytest.mark.suite, id="long")]
)
def test_openapi(server: Server, examples: int, record_property: Any) -> None:
    """schemathesis reads the OpenAPI document of a running server, and asks what nobody would."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.http}/openapi.json")
    checks = [schemathesis.checks.not_a_server_error]
    seen: Counter[str] = Counter()
    turns = itertools.count()
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=strategy)
        def ask(case: Any) -> None:
            turn = next(turns)
            for name, known in (("name", ("three", "text", "apart")), ("version", ("1",))):
                if name in case.path_parameters and turn % 3:  # else nearly all would be of models that are not there
                    case.path_parameters[name] = known[turn % len(known)]
            response = case.call(timeout=60)
            seen[str(response.status_code)] += 1
            if response.status_code != 503:  # what cannot be loaded now
                case.validate_response(response, checks=checks)

        ask()
    record_property("summary", f"OpenAPI: {seen.total()} requests by schemathesis: {dict(seen.most_common())}")
    assert seen["200"] and seen.total() > 10 * examples
    assert not server.errors, server.errors[:3]
