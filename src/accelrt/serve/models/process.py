"""A model in a process of its own: if it crashes, hangs or is killed, its calls fail and the server lives.

`accelrt.isolation.Child` answers one call at a time with plain data; here many calls are under way at once and arrays
travel as raw bytes, so the channel is another. A process that died is started again after a pause that grows.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import IO, TYPE_CHECKING, Any

from accelrt.errors import AccelrtError, IsolatedError, ModelUnavailable, SessionClosed
from accelrt.graph.types import Signature, Value
from accelrt.runtime.runner import Outputs
from accelrt.serve.models import frames
from accelrt.serve.models.loading import Facts, resident_bytes
from accelrt.serve.models.settings import DEFAULT_HANG_S, ModelSettings

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact

LOAD_TIMEOUT_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0
SETTLED_S = 60.0
"""A process that lived so long did not die of how it was started: the pause begins anew."""
_LAST_WORDS = 600


@dataclass(frozen=True, slots=True)
class _Failure:
    error: AccelrtError


class WorkerProcess:
    """One incarnation: started and loaded when this returns.

    Raises:
        IsolatedError: It died or hung while it loaded.
        AccelrtError: Whatever loading the model raised in it.
    """

    def __init__(
        self, asked: Mapping[str, Any], hang_s: float, died: Callable[[WorkerProcess, str], None], name: str
    ) -> None:
        self._hang_s, self._died, self._name = hang_s, died, name
        self._numbers = itertools.count()
        self._pending: dict[int, SimpleQueue[Outputs | _Failure]] = {}
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._end: str | None = None
        self._closing = False
        self._why: str | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self._connection, theirs):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "accelrt.serve.models.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                process_group=0,
            )
        self.began = time.monotonic()
        try:
            self.described = self._handshake(asked)
        except BaseException:
            self.close()
            raise
        self._reader = threading.Thread(target=self._read, name=f"accelrt-worker-reader {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it takes calls."""
        return self._end is None

    def call(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one call.

        Raises:
            ModelUnavailable: The process died or hung with the call in it.
            AccelrtError: The model failed.
        """
        answer: SimpleQueue[Outputs | _Failure] = SimpleQueue()
        number = next(self._numbers)
        with self._lock:
            if self._end is not None:
                raise _unavailable(self._name, self._end)
            self._pending[number] = answer
        try:
            with self._sending:
                frames.send(self._connection, {"id": number}, feeds)
        except BlockingIOError:
            self._why = f"took no request for {self._hang_s:g} s and was killed"
            self._kill()
        except OSError:
            pass  # the reader sees the end of it, and answers
        try:
            result = answer.get(timeout=self._hang_s)
        except Empty:
            self._why = f"did not answer within {self._hang_s:g} s and was killed"
            self._kill()
            result = answer.get()
        if isinstance(result, _Failure):
            raise result.error
        return result

    def close(self) -> None:
        """End the process; what is being computed is lost."""
        self._closing = True
        self._kill()
        self._process.wait()
        with contextlib.suppress(AttributeError):
            if threading.current_thread() is not self._reader:
                self._reader.join()
        self._connection.close()
        self._log.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def _handshake(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self._connection.settimeout(LOAD_TIMEOUT_S)
        try:
            frames.send(self._connection, asked)
            answer = frames.receive(self._connection)
        except TimeoutError:
            raise IsolatedError(f"Loading model {self._name!r} took longer than {LOAD_TIMEOUT_S:g} s.") from None
        except (OSError, frames.BrokenFrame):
            answer = None
        if answer is None:
            raise IsolatedError(f"The worker of model {self._name!r} {self._cause()} while it loaded.{self._tail()}")
        self._connection.settimeout(None)
        # One that reads nothing must not hold up who sends; half a frame is of no use, so it is killed then.
        limit = struct.pack("ll", int(self._hang_s), int(self._hang_s % 1 * 1e6) + 1)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        if "error" in answer[0]:
            raise frames.error_from_json(answer[0]["error"])
        return answer[0]

    def _read(self) -> None:
        broken = None
        try:
            while (frame := frames.receive(self._connection)) is not None:
                head, values = frame
                with self._lock:
                    waiting = self._pending.pop(head["id"], None)
                if waiting is not None:
                    waiting.put(_Failure(frames.error_from_json(head["error"])) if "error" in head else values)
        except OSError:
            pass
        except (frames.BrokenFrame, KeyError) as error:
            broken = f"sent what cannot be read ({error}) and was killed"
        self._why = self._why or broken
        self._kill()
        end = f"{self._why or self._cause()}.{'' if self._closing else self._tail()}"
        with self._lock:
            self._end = end
            lost, self._pending = self._pending, {}
        # First who restarts it, so that a client that asks again at once is told to wait.
        if not self._closing:
            self._died(self, end)
        for waiting in lost.values():
            waiting.put(_Failure(_unavailable(self._name, end)))

    def _cause(self) -> str:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _tail(self) -> str:
        with contextlib.suppress(ValueError, OSError):
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - _LAST_WORDS))
            text = " ".join(self._log.read().decode("utf-8", "replace").split())
            return f" Its last words: {text}" if text else ""
        return ""


class IsolatedPredictor:
    """Computes calls in a worker process, and starts another when it dies.

    Args:
        artifact: What it loads; kept, so that its files stay.
        settings: The model's.
        replicas: Copies that Triton's configuration asks for.
        name: Of the model.
        changed: Told in another thread when it becomes unavailable, with the reason, and None when it is back.
    """

    def __init__(
        self,
        artifact: Artifact,
        settings: ModelSettings,
        replicas: int | None,
        name: str,
        changed: Callable[[str | None], None],
    ) -> None:
        self._artifact, self._name, self._changed = artifact, name, changed
        self._asked = {
            "folder": str(artifact.folder),
            "trusted": artifact.trusted,
            "settings": {key: value for key, value in asdict(settings).items() if value is not None},
            "replicas": replicas,
        }
        self._hang_s = settings.hang_timeout_s or DEFAULT_HANG_S
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failures = 0
        self._back_at = 0.0
        self.restarts = 0
        """How often the process was started again."""
        self._worker: WorkerProcess | None = None
        self._last = worker = self._start()
        with self._lock:
            if worker.alive:  # else it is being started again already
                self._worker = worker
        described = worker.described
        self.signature = Signature.from_json(described["signature"])
        self._capacity = int(described["capacity"])

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._asked, self._hang_s, self._lost, self._name)

    @property
    def capacity(self) -> int:
        """Calls under way at once that keep it busy."""
        return self._capacity

    @property
    def pid(self) -> int | None:
        """The worker's process, None while there is none."""
        worker = self._worker
        return None if worker is None else worker.pid

    def facts(self) -> Facts:
        """Return what the worker told of the model."""
        worker = self._last
        told = worker.described
        return Facts(
            self.signature,
            str(told["platform"]),
            tuple(told["engines"]),
            tuple(told["devices"]),
            int(told["resident_bytes"]) or resident_bytes(worker.pid),
            placement=dict(told["placement"]),
        )

    def predict(self, feeds: Mapping[str, Value], /) -> Outputs:
        """Compute one call.

        Raises:
            ModelUnavailable: The worker died with the call in it, or is being started again.
            AccelrtError: The model failed.
        """
        worker = self._worker
        if self._closed.is_set():
            raise SessionClosed("The model was unloaded.", hint="Ask for it again.")
        if worker is None:
            error = _unavailable(self._name, "is being started again")
            error.retry_after_s = max(self._back_at - time.monotonic(), 0.05)
            raise error
        return worker.call(feeds)

    def close(self) -> None:
        """End the worker; no call is under way any more."""
        self._closed.set()
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _lost(self, worker: WorkerProcess, end: str) -> None:
        """Called by the reader of a worker that died."""
        with self._lock:
            if self._closed.is_set():
                return
            self._worker = None
            if time.monotonic() - worker.began > SETTLED_S:
                self._failures = 0
        self._changed(f"its worker {end}")
        threading.Thread(
            target=self._restart, args=(worker,), name=f"accelrt-worker-restart {self._name}", daemon=True
        ).start()

    def _restart(self, dead: WorkerProcess) -> None:
        dead.close()
        while not self._closed.is_set():
            pause = min(FIRST_PAUSE_S * 2**self._failures, LONGEST_PAUSE_S)
            self._failures = min(self._failures + 1, 16)
            self._back_at = time.monotonic() + pause
            if self._closed.wait(pause):
                return
            try:
                worker = self._start()
            except AccelrtError as error:
                self._changed(f"its worker could not be started again: {error.message}")
                continue
            with self._lock:
                closed = self._closed.is_set()
                if not closed and worker.alive:  # one that died already has begun its own restart
                    self._worker, self._last = worker, worker
                    self.restarts += 1
            if closed:
                worker.close()
            elif worker.alive:
                self._changed(None)
            return


def _unavailable(name: str, why: str) -> ModelUnavailable:
    error = ModelUnavailable(f"The worker process of model {name!r} {why}", hint="It is started again; ask again.")
    error.retry_after_s = 1.0
    return error
