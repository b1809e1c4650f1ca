"""More models than fit: requests for many models, of which the server keeps a few in memory.

A real ``accelrt serve`` in a process of its own, and clients over HTTP in processes of theirs. Each model multiplies by
a number of its own, so that an answer tells which model gave it; each request asks with a number of its own, so that
it tells whose answer it is. Demand follows a power law, as where each tenant has a model. A few models are pinned, and
two clients of their own ask for nothing else, a hundred times a second each: once while the other clients ask only for
models that stay in memory, once while they ask for all, so that models are loaded and unloaded all the time.

Claims: no answer is wrong, no request is lost or refused; never more models in memory than allowed; the process does
not grow in the second half of the run; and loads add at most `BOUND_MS` to the p99 of the models that stay.

    python benchmarks/serve_many.py --minutes 10
    python benchmarks/serve_many.py --in-process --minutes 1     # the models alone, without a network
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measure import machine

from accelrt.errors import ModelUnavailable
from accelrt.serve.interface import InferRequest
from accelrt.serve.models import ModelService, ServiceSettings
from accelrt.serve.models.loading import resident_bytes
from accelrt.testing.models import Builder

WIDTH = 256
GROWTH = 1.10
PINNED = 4
PROBES, PROBE_S = 2, 0.01
QUIET_SHARE = 0.1
"""Of the time goes to the part without loads."""
STOPPED_S = 2.0
BOUND_MS = 25.0
"""What loads may add to the p99 of a model that stays in memory, with a hundred loads a second, where cores are not
overcommitted."""


def line(slope: float) -> onnx.ModelProto:
    """y = slope * x."""
    net = Builder("line", 0)
    x = net.input("x", ("batch", WIDTH))
    net.output(net.node("Mul", x, net.weight(np.full(WIDTH, slope, np.float32)), name="y"), ("batch", WIDTH))
    return net.model()


# Over HTTP

_COUNTS = ("sent", "right", "wrong", "refused", "lost", "reconnected", "stopped")


@dataclass
class Counts:
    """What clients saw.

    Attributes:
        lost: No answer.
        refused: A typed error.
        reconnected: The connection had been closed while nothing was under way on it, and the request went out on a new
            one, as clients of HTTP do.
        stopped: Requests under way while all of this was stopped from outside for more than `STOPPED_S`, as a machine
            that is shared may do; their times say nothing, and those that were refused for waiting are not counted as
            refused.
    """

    sent: int = 0
    reconnected: int = 0
    stopped: int = 0
    right: int = 0
    wrong: int = 0
    refused: int = 0
    lost: int = 0
    waits_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add another's."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.waits_ms += other.waits_ms
        self.errors = (self.errors + other.errors)[:10]

    def summary(self) -> dict[str, Any]:
        """Return it as JSON, with percentiles in place of the times."""
        waits = np.array(self.waits_ms or [float("nan")])
        p50, p99 = (float(np.percentile(waits, share)) for share in (50, 99))
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "p50_ms": p50, "p99_ms": p99, "most_ms": float(waits.max()), "errors": self.errors}


class Connection:
    """One connection of HTTP, kept alive; tensors travel as bytes."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, number: int, value: float, counts: Counts) -> None:
        """Ask model ``number`` once, and count what comes of it."""
        counts.sent += 1
        start = time.perf_counter()
        used = self.writer is not None
        try:
            try:
                head = await self._exchange(number, value)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                if not used or getattr(error, "partial", b""):
                    raise
                self.writer = None
                counts.reconnected += 1
                head = await self._exchange(number, value)
            assert self.reader is not None
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await self.reader.readexactly(length)
        except (OSError, EOFError, ValueError) as error:
            counts.lost += 1
            counts.errors.append(f"{type(error).__name__}: {error}")
            self.writer = None
            return
        stopped = Clock.stopped_at >= start
        counts.stopped += stopped
        if not stopped:
            counts.waits_ms.append((time.perf_counter() - start) * 1e3)
        if head[9:12] != b"200":
            if not stopped:
                counts.refused += 1
                counts.errors.append(body[:200].decode("latin-1"))
            return
        found = np.frombuffer(body[-4 * WIDTH :], "<f4")
        right = f'"m{number}"'.encode() in body[: -4 * WIDTH] and bool((found == value * (number + 1)).all())
        counts.right, counts.wrong = counts.right + right, counts.wrong + (not right)

    async def _exchange(self, number: int, value: float) -> bytes:
        """Send a request, and return the head of its answer."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        self.writer.write(_request(number, value))
        return await self.reader.readuntil(b"\r\n\r\n")


class Clock:
    """Tells when this process was last stopped from outside."""

    stopped_at = -1.0

    @classmethod
    async def watch(cls) -> None:
        """Look at the time again and again."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.05)
            if time.perf_counter() - before > STOPPED_S:
                # The server goes on a moment later; what is answered until then was under way.
                cls.stopped_at = time.perf_counter() + 1.0


def _request(number: int, value: float) -> bytes:
    inputs = [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "parameters": {"binary_data_size": 4 * WIDTH}}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    lines = (
        f"POST /v2/models/m{number}/infer HTTP/1.1\r\nhost: localhost\r\n"
        f"inference-header-content-length: {len(head)}\r\ncontent-length: {len(head) + 4 * WIDTH}\r\n\r\n"
    )
    return lines.encode() + head + np.full(WIDTH, value, "<f4").tobytes()


def probe(port: int, seconds: float, seed: int) -> Counts:
    """Ask for pinned models at a steady rate; in a process of its own."""

    async def run() -> Counts:
        watch = asyncio.create_task(Clock.watch())
        counts, generator, connection = Counts(), np.random.default_rng(seed), Connection(port)
        until = due = time.monotonic()
        until += seconds
        while due < until:
            await connection.ask(int(generator.integers(PINNED)), float(generator.integers(1, 1000)), counts)
            due = max(due + PROBE_S, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        watch.cancel()
        return counts

    return asyncio.run(run())


def roam(port: int, seconds: float, seed: int, clients: int, models: int) -> Counts:
    """Ask for one model after another from many connections; in a process of its own."""

    async def client(seed: int, until: float, counts: Counts) -> None:
        generator, connection = np.random.default_rng(seed), Connection(port)
        while time.monotonic() < until:
            number = min(int(generator.pareto(1.0) * models / 20), models - 1)
            await connection.ask(number, float(generator.integers(1, 1000)), counts)
            await asyncio.sleep(float(generator.exponential(0.02)))

    async def run() -> Counts:
        watch = asyncio.create_task(Clock.watch())
        counts, until = Counts(), time.monotonic() + seconds
        await asyncio.gather(*(client(seed + n, until, counts) for n in range(clients)))
        watch.cancel()
        return counts

    return asyncio.run(run())


@contextmanager
def served(root: Path, resident: int) -> Iterator[tuple[int, int, int]]:
    """Start a server; give its port, that of its metrics, and its process."""
    command = [sys.executable, "-m", "accelrt", "serve", str(root), "--max-resident-models", str(resident)]
    command += ["--http-port", "0", "--grpc-port", "-1", "--metrics-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ports = []
            for name in ("http", "metrics"):
                announced = process.stdout.readline()
                if not announced.startswith(f"{name}: "):
                    raise RuntimeError(f"the server did not start: {announced!r}")
                ports.append(int(announced.rpartition(":")[2]))
            yield ports[0], ports[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def residents(port: int) -> int:
    """Return how many models the server has in memory, by its index: READY ones that are not out until asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v2/repository/index", "{}")
        rows = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return sum(row["state"] == "READY" and "not in memory" not in row.get("reason", "") for row in rows)


def part(port: int, pid: int, seconds: float, clients: int, models: int) -> dict[str, Any]:
    """Run clients and probes for a while, and watch the server meanwhile."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 + PROBES, mp_context=spawn) as pool:
        list(pool.map(time.sleep, [0.2] * (1 + PROBES)))  # their start belongs to no measurement
        start = time.monotonic()
        roaming = pool.submit(roam, port, seconds, 1000, clients, models)
        probing = [pool.submit(probe, port, seconds, 2000 + number) for number in range(PROBES)]
        most, middle, memory = 0, 0, []
        while not roaming.done():
            time.sleep(min(1.0, seconds / 20))
            most = max(most, residents(port))
            memory.append(resident_bytes(pid))
            if not middle and time.monotonic() - start > seconds / 2:
                middle = memory[-1]
        others, probes = roaming.result(), Counts()
        for each in probing:
            probes.add(each.result())
    return {
        "seconds": seconds,
        "others": others.summary(),
        "pinned": probes.summary(),
        "most_in_memory": most,
        "rss_half_way": middle or memory[-1],
        "rss_end": memory[-1],
        "rss_most": max(memory),
    }


def over_http(root: Path, asked: argparse.Namespace) -> bool:
    """Measure with a server and clients; report, and tell whether the claims hold."""
    for number in range(PINNED):
        (root / f"m{number}.accelrt.json").write_text('{"pinned": true}')
    seconds = asked.minutes * 60
    with served(root, asked.resident) as (port, metrics, pid):
        for number in range(asked.models):  # so that no compile falls into the measurement
            asyncio.run(Connection(port).ask(number, 1.0, Counts()))
        quiet = part(port, pid, max(5.0, seconds * QUIET_SHARE), asked.clients, PINNED)
        loads_before = loads_of(metrics)
        loading = part(port, pid, max(5.0, seconds * (1 - QUIET_SHARE)), asked.clients, asked.models)
        loads = loads_of(metrics) - loads_before
    added = loading["pinned"]["p99_ms"] - quiet["pinned"]["p99_ms"]
    claims = {
        "no wrong answer": not any(one[who]["wrong"] for one in (quiet, loading) for who in ("others", "pinned")),
        "none lost": not any(one[who]["lost"] for one in (quiet, loading) for who in ("others", "pinned")),
        "none refused": not any(one[who]["refused"] for one in (quiet, loading) for who in ("others", "pinned")),
        f"at most {asked.resident} in memory": loading["most_in_memory"] <= asked.resident,
        f"memory at the end at most {GROWTH} times that half-way": loading["rss_end"]
        <= loading["rss_half_way"] * GROWTH,
        f"loads add at most {BOUND_MS:g} ms to the p99 of pinned models": added <= BOUND_MS,
    }
    result: dict[str, Any] = {
        "title": f"{asked.models} models, room for {asked.resident}, {asked.clients} clients and {PROBES} probes",
        "machine": machine(),
        "load_average": os.getloadavg(),
        "without_loads": quiet,
        "with_loads": {**loading, "loads": loads, "loads_a_second": loads / loading["seconds"]},
        "added_p99_ms": added,
        "claims": claims,
    }
    _report(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return all(claims.values())


def loads_of(port: int) -> int:
    """Return how often models were loaded, by the server's metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("accelrt_model_loads_total")))


def _report(result: Mapping[str, Any]) -> None:
    print(result["title"])
    print(result["machine"])
    print("load average", *(f"{value:.1f}" for value in result["load_average"]))
    for name in ("without_loads", "with_loads"):
        one = result[name]
        for who in ("others", "pinned"):
            row = one[who]
            counts = ", ".join(f"{key} {row[key]}" for key in _COUNTS)
            times = ", ".join(f"{key} {row[f'{key}_ms']:.3g} ms" for key in ("p50", "p99", "most"))
            print(f"{name:14} {who:7} {counts}; {times}")
            for error in row["errors"]:
                print(f"    {error}")
    one = result["with_loads"]
    print(
        f"in memory at most {one['most_in_memory']}; resident {one['rss_half_way'] >> 20} MiB half-way, "
        f"{one['rss_end'] >> 20} MiB at the end; {one['loads']} loads, {one['loads_a_second']:.3g} a second; "
        f"they add {result['added_p99_ms']:.3g} ms to the p99 of pinned models"
    )
    for claim, held in result["claims"].items():
        print(f"- {'Held' if held else 'MISSED'}: {claim}.")


# In this process


class Run:
    """Counts of one run."""

    def __init__(self) -> None:
        self.right = self.wrong = self.refused = self.most = 0
        self.waits: list[float] = []


async def client(service: ModelService, models: int, until: float, seed: int, run: Run) -> None:
    """Ask one model after another until the time is over."""
    generator = np.random.default_rng(seed)
    while time.monotonic() < until:
        number = min(int(generator.pareto(1.0) * models / 20), models - 1)
        value = float(generator.integers(1, 1000))
        asked = InferRequest({"x": np.full((1, WIDTH), value, np.float32)})
        start = time.perf_counter()
        try:
            model = service.find(f"m{number}") or await service.model(f"m{number}")
            answer = model.infer_now(asked) or await model.infer(asked)
        except ModelUnavailable:
            run.refused += 1
            continue
        finally:
            model = None  # a model that is held is not unloaded at once
        run.waits.append(time.perf_counter() - start)
        run.most = max(run.most, service.residency.count)
        right = answer.model_name == f"m{number}" and (answer.outputs["y"] == value * (number + 1)).all()
        run.right, run.wrong = run.right + bool(right), run.wrong + (not right)
        await asyncio.sleep(0)


async def in_process(root: Path, asked: argparse.Namespace) -> bool:
    """Measure the models without a network; report, and tell whether the claims hold."""
    seconds, models = asked.minutes * 60, asked.models
    async with ModelService(ServiceSettings((root,), max_resident_models=asked.resident)) as service:
        run = Run()
        until = time.monotonic() + seconds
        tasks = [asyncio.create_task(client(service, models, until, seed, run)) for seed in range(asked.clients)]
        await asyncio.sleep(seconds / 2)
        middle = resident_bytes()
        await asyncio.gather(*tasks)
        end = resident_bytes()
        evictions = service.residency.evictions
    waits = np.array(run.waits) * 1e3
    print(f"{models} models, room for {asked.resident}, {asked.clients} clients, {seconds:g} s, without a network")
    print(f"{run.right} right, {run.wrong} wrong, {run.refused} refused, {evictions} unloaded to make room")
    print(f"p50 {np.percentile(waits, 50):.3g} ms, p99 {np.percentile(waits, 99):.3g} ms, most {waits.max():.3g} ms")
    print(f"in memory at most {run.most}; resident {middle >> 20} MiB half-way, {end >> 20} MiB at the end")
    return run.wrong == 0 and run.refused == 0 and run.most <= asked.resident and end <= middle * GROWTH


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--resident", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--in-process", action="store_true", help="the models alone, without server and network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("ACCELRT_CACHE_DIR", str(Path(scratch) / "cache"))
        root = Path(scratch) / "repository"
        root.mkdir()
        for number in range(asked.models):
            onnx.save(line(number + 1), root / f"m{number}.onnx")
        holds = asyncio.run(in_process(root, asked)) if asked.in_process else over_http(root, asked)
    print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
