"""Run what may crash in a child process, with a limit on time and memory.

Vendors' compilers abort, loop and eat memory; the process that asked must live. One child is kept and reused by
`call`, since importing a runtime costs about a second; whatever kills it kills only the call at hand. Who needs a
process of its own, to measure it or to keep something in it between calls, starts a `Child`.

A child may use isolation in turn. Its descendants count towards its memory limit and end with it.

A call names a module-level function and passes plain data, so nothing is pickled either way.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self

from accelrt import errors
from accelrt.errors import AccelrtError, CompileError, IsolatedError

TIMEOUT_S = 1800.0
"""Compilers for accelerators take minutes; half an hour is a hang."""

_POLL_S = 0.05
_LOG_CHARACTERS = 2000
_NESTED = "ACCELRT_ISOLATED"


_NOTHING: Mapping[str, str] = MappingProxyType({})


def call(
    function: str,
    *,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int | None = None,
    environment: Mapping[str, str] = _NOTHING,
    **arguments: Any,
) -> Any:
    """Call ``module:function`` in a child process and return its result.

    Whatever the function starts is in the child's process group, and is killed with it.

    Args:
        function: A function at the top level of an importable module.
        timeout_s: Seconds until the child is killed.
        memory_bytes: Resident bytes at which the child is killed; None for no limit.
        environment: Variables that must be set before anything is imported; a child with others is replaced.
        arguments: JSON data, passed by name.

    Raises:
        IsolatedError: The child crashed, hung or passed its memory limit.
        AccelrtError: Raised by the function, of the same class.
        CompileError: The function raised anything else.
    """
    with _LOCK:
        return _child(environment).call(function, timeout_s=timeout_s, memory_bytes=memory_bytes, **arguments)


def restart() -> None:
    """End the child; the next call starts another, which sees the environment and the import path of that moment."""
    global _CURRENT
    with _LOCK:
        if _CURRENT is not None:
            _CURRENT.close()
        _CURRENT = None


class Child:
    """A child process that answers one call at a time; close it, or use it as a context manager.

    Args:
        environment: Variables that it has besides those of this process.
    """

    def __init__(self, environment: Mapping[str, str] = _NOTHING) -> None:
        self.environment = dict(environment)
        self.owner = os.getpid()
        self._closed = False
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        path = os.pathsep.join(path for path in sys.path if path)
        # The outermost child leads a process group, so that its own children cannot outlive it.
        self._leads = _NESTED not in os.environ
        self._process = subprocess.Popen(
            [sys.executable, "-m", "accelrt.isolation", str(request_read), str(reply_write)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(request_read, reply_write),
            env={**os.environ, **environment, "PYTHONPATH": path, _NESTED: "1"},
            process_group=0 if self._leads else None,
        )
        os.close(request_read)
        os.close(reply_write)

    def alive(self) -> bool:
        """Whether the process is there to take a call, and this is the process that started it."""
        return self.owner == os.getpid() and self._process.poll() is None

    def call(
        self, function: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int | None = None, **arguments: Any
    ) -> Any:
        """Call ``module:function`` in the child; arguments, results and errors are as for `isolation.call`.

        After an `IsolatedError` the child is gone.
        """
        self._log.truncate(0)
        self._log.seek(0)
        try:
            _write(self._requests, json.dumps([function, arguments]).encode() + b"\n")
            reply = self._wait(function, time.monotonic() + timeout_s, timeout_s, memory_bytes)
        except BaseException:
            self.close()  # also on KeyboardInterrupt: a late reply must not answer the next call
            raise
        if "error" in reply:
            raise _rebuild(reply["error"])
        return reply["result"]

    def _wait(self, function: str, deadline: float, timeout_s: float, memory_bytes: int | None) -> dict[str, Any]:
        received = bytearray()
        while not received.endswith(b"\n"):
            readable, _, _ = select.select([self._replies], [], [], _POLL_S)
            if readable:
                chunk = os.read(self._replies, 1 << 20)
                if not chunk:
                    raise IsolatedError(f"{function} {self._cause_of_death()} in its child process.{self._tail()}")
                received += chunk
            elif time.monotonic() > deadline:
                raise IsolatedError(f"{function} was stopped after {timeout_s:g} s.{self._tail()}")
            elif memory_bytes is not None and (used := self._resident_bytes()) > memory_bytes:
                raise IsolatedError(
                    f"{function} was stopped when it held {used >> 20} MiB; its limit is {memory_bytes >> 20} MiB."
                )
        reply: dict[str, Any] = json.loads(received)
        return reply

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended the process with code {code}"

    def _resident_bytes(self) -> int:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return sum(map(_resident_bytes, _family(self._process.pid)))
        return 0

    def _tail(self) -> str:
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f" Its last words: {text[-_LOG_CHARACTERS:]}" if text else ""

    def close(self) -> None:
        """End the process and all that it started; closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        if self.owner == os.getpid():
            if self._leads:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        for descriptor in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for parent in found:  # grows while it is read
        for task in Path(f"/proc/{parent}/task").iterdir():
            with contextlib.suppress(OSError):
                found.extend(map(int, (task / "children").read_text().split()))
    return found


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


_LOCK = threading.Lock()
_CURRENT: Child | None = None


def _child(environment: Mapping[str, str]) -> Child:
    global _CURRENT
    if _CURRENT is not None and environment and _CURRENT.environment != environment:
        _CURRENT.close()
    if _CURRENT is None or not _CURRENT.alive():
        if _CURRENT is not None:
            _CURRENT.close()
        _CURRENT = Child(environment)
    return _CURRENT


@atexit.register
def _stop() -> None:
    if _CURRENT is not None and _CURRENT.alive():
        _CURRENT.close()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError as error:
        raise IsolatedError("The child process that compiles is gone before it was asked.") from error


def _rebuild(error: dict[str, Any]) -> AccelrtError:
    cls = getattr(errors, error["type"], None)
    if isinstance(cls, type) and issubclass(cls, AccelrtError):
        return cls(error["message"], hint=error["hint"], backend=error["backend"])
    return CompileError(f"{error['type']}: {error['message']}")


def _describe(error: BaseException) -> dict[str, Any]:
    known = isinstance(error, AccelrtError)
    return {
        "type": type(error).__name__,
        "message": error.message if isinstance(error, AccelrtError) else str(error),
        "hint": error.hint if isinstance(error, AccelrtError) else None,
        "backend": error.backend if isinstance(error, AccelrtError) else None,
        "traceback": "" if known else traceback.format_exc(),
    }


def _serve(requests: int, replies: int) -> None:
    """Answer calls until the parent closes the pipe, which it also does by dying."""
    with contextlib.suppress(OSError):  # if memory runs out, the kernel should take this process and not who asked
        Path("/proc/self/oom_score_adj").write_text("1000")
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            name, arguments = json.loads(line)
            module, _, function = name.partition(":")
            reply: dict[str, Any]
            try:
                reply = {"result": getattr(importlib.import_module(module), function)(**arguments)}
            except Exception as error:  # noqa: BLE001 - every error of foreign code goes back to who asked
                reply = {"error": _describe(error)}
            _write(replies, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
