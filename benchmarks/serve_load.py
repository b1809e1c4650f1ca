"""The clients of `serve.py`, in a process of their own: what they are to send is JSON in, what they saw is JSON out.

With ``floor`` it is a server that does nothing, to see what is left of a latency then.

``closed`` keeps so many requests under way, as wrk does. ``open`` sends each request at its own time, whether or not
those before it were answered, and counts latency from the time when it was due: a server that stands still is not
spared the requests that would have come meanwhile (coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import select
import socket
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

CONNECTIONS = 64
_BUSY_S = 0.002
"""A next request that is due sooner is waited for by polling; sleeping is that exact at best."""


def request(target: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return a request's bytes."""
    lines = [f"POST {target} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def connect(port: int) -> socket.socket:
    """Return a connection that sends at once."""
    one = socket.create_connection(("127.0.0.1", port), 60)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def ask(one: socket.socket, payload: bytes) -> bytes:
    """Send a request, and return its whole reply.

    Raises:
        RuntimeError: It was no success.
    """
    one.sendall(payload)
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += _received(one)
    head, _, body = reply.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(reply[:300].decode("latin-1"))
    (length,) = (int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
    while len(body) < length:
        more = _received(one)
        body, reply = body + more, reply + more
    return reply


def _received(one: socket.socket) -> bytes:
    data = one.recv(2**18)
    if not data:
        raise RuntimeError("The server closed the connection.")
    return data


class Load:
    """Connections to one server over which the same request goes again and again; replies are all of one size."""

    def __init__(self, port: int, payload: bytes, connections: int) -> None:
        self._payload = payload
        self._all = {one.fileno(): one for one in (connect(port) for _ in range(connections))}
        self._size = len({fd: ask(one, payload) for fd, one in self._all.items()}.popitem()[1])
        self._poll = select.epoll()
        for fd in self._all:
            self._poll.register(fd, select.EPOLLIN)
        self._idle = deque(self._all)
        self._due: dict[int, deque[float]] = {fd: deque() for fd in self._all}
        self._got = dict.fromkeys(self._all, 0)
        self.doubled = 0
        """Requests that were sent behind another one of the same connection, as none was idle."""

    def closed(self, count: int) -> tuple[float, list[float]]:
        """Return the seconds that ``count`` requests took with one under way on each connection, and each one's."""
        start, sent, took = time.perf_counter(), 0, []
        while len(took) < count:
            while self._idle and sent < count:
                self._send(time.perf_counter())
                sent += 1
            took += self._receive(1.0)
        return time.perf_counter() - start, took

    def open(self, due: list[float]) -> list[float]:
        """Return the seconds from when each request was due until its reply was there, in order of replies."""
        start, sent, took, count = time.perf_counter() + 0.01, 0, [], len(due)
        while len(took) < count:
            now = time.perf_counter() - start
            while sent < count and due[sent] <= now:
                self._send(start + due[sent])
                sent += 1
            wait = due[sent] - now if sent < count else 1.0
            took += self._receive(0.0 if wait < _BUSY_S else wait - _BUSY_S / 2)
        return took

    def _send(self, due: float) -> None:
        if self._idle:
            fd = self._idle.popleft()
        else:
            fd = min(self._due, key=lambda each: len(self._due[each]))
            self.doubled += 1
        self._due[fd].append(due)
        self._all[fd].sendall(self._payload)

    def _receive(self, seconds: float) -> list[float]:
        took = []
        for fd, _ in self._poll.poll(seconds):
            data = _received(self._all[fd])
            now, due = time.perf_counter(), self._due[fd]
            if not self._got[fd] and not data.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(data[:300].decode("latin-1"))
            self._got[fd] += len(data)
            while self._got[fd] >= self._size:
                self._got[fd] -= self._size
                took.append(now - due.popleft())
                if not due:
                    self._idle.append(fd)
        return took


def arrivals(rate: float, seconds: float, kind: str, seed: int = 0) -> list[float]:
    """Return when requests are due: ``paced`` at equal distances, ``poisson`` at random ones."""
    if kind == "paced":
        return [number / rate for number in range(int(rate * seconds))]
    draw, due, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        due.append(now)
    return due


def ideal(due: list[float], service_s: float, servers: int) -> list[float]:
    """Return what each request takes in a queue without any cost: first come, first served, always ``service_s``."""
    free, took = [0.0] * servers, []
    for moment in due:
        begin = max(moment, free[0])
        free = sorted([*free[1:], begin + service_s])
        took.append(begin + service_s - moment)
    return took


def percentiles(took: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, and how many there were."""
    cuts = statistics.quantiles(took, n=100)
    return {"n": len(took), "p50_s": cuts[49], "p99_s": cuts[98]}


def stolen(seconds: float) -> dict[str, float]:
    """Return the share of the time that the machine takes from a process which only looks at the clock, and the longest
    gap: pauses of more than a millisecond are not the process's own. Where the share is above 0.01, the 99th
    percentile of anything short is the machine's."""
    start = last = time.perf_counter()
    gone = longest = 0.0
    while last - start < seconds:
        now = time.perf_counter()
        if now - last > 0.001:
            gone, longest = gone + now - last, max(longest, now - last)
        last = now
    return {"share": gone / seconds, "longest_s": longest}


def main() -> None:
    """Do what the JSON on standard input says."""
    task: dict[str, Any] = json.load(sys.stdin)
    gc.disable()  # a collection here would be seen as the server's latency
    if (processor := task.get("processor")) is not None:
        os.sched_setaffinity(0, {processor})
    payload = request(task["target"], Path(task["body"]).read_bytes(), task["headers"])
    load = Load(task["port"], payload, task["connections"])
    if task["kind"] == "closed":
        seconds, took = load.closed(task["count"])
        json.dump({"seconds": seconds, **percentiles(took)}, sys.stdout)
        return
    took = load.open(arrivals(task["rate"], task["seconds"], task["kind"], task["seed"]))
    json.dump({"doubled": load.doubled, **percentiles(took)}, sys.stdout)


def floor(port: int, reply: bytes) -> None:
    """Answer every request with the same bytes, as soon as it is there."""
    import uvloop

    class Answer(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self._transport, self._rest = transport, b""

        def data_received(self, data: bytes) -> None:
            rest = self._rest + data
            while True:
                head, found, _ = rest.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]) if found else 0
                if not found or len(rest) < len(head) + 4 + length:
                    break
                rest = rest[len(head) + 4 + length :]
                self._transport.write(reply)
            self._rest = rest

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Answer, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    if sys.argv[1:2] == ["floor"]:
        floor(int(sys.argv[2]), Path(sys.argv[3]).read_bytes())
    else:
        main()
