"""A process with the vendor's Python in it: one model lives there, and what crashes it leaves this process alive."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from accelrt_eia import vendor_side

SCRIPT = Path(vendor_side.__file__)
_LOG_CHARACTERS = 4000
_POLL_S = 0.05
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class VendorError(Exception):
    """What the vendor's code raised: ``kind`` is the name of its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class VendorDied(Exception):
    """The process is gone, or did not answer in time; ``log`` is the end of what it printed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}. Its last words: {log}" if log else message)
        self.log = log


class VendorProcess:
    """One process; answers one call at a time. Close it.

    Args:
        python: The interpreter, None for this one.

    Raises:
        VendorDied: The interpreter cannot be started.
    """

    def __init__(self, python: str | None = None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        requests, self._request_end = os.pipe()
        self._answer_end, answers = os.pipe()
        environment = dict(os.environ)
        if python is None:  # what can be imported here can be imported there
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, str(SCRIPT), str(requests), str(answers)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(requests, answers),
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        except OSError as error:
            for descriptor in (self._request_end, self._answer_end):
                os.close(descriptor)
            self._log.close()
            raise VendorDied(f"{python} cannot be started: {error}", "") from error
        finally:
            os.close(requests)
            os.close(answers)
        os.set_blocking(self._answer_end, False)
        self._requests = os.fdopen(self._request_end, "wb")
        self._closed = False

    def call(
        self, call: str, timeout_s: float, arrays: Mapping[str, Any] = _NOTHING, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ask for something; returns the header of the answer, and its arrays by name.

        Raises:
            VendorError: The vendor's code raised.
            VendorDied: It crashed, or took longer than ``timeout_s`` seconds.
        """
        if self._closed:
            raise VendorDied("It was closed", "")
        answers = _Answers(self._answer_end, time.monotonic() + timeout_s)
        try:
            vendor_side.write(self._requests, {"call": call, **arguments}, dict(arrays))
            answer = vendor_side.read(answers)
        except TimeoutError as error:
            raise VendorDied(f"It did not answer within {timeout_s:g} s", self._end()) from error
        except (OSError, EOFError, ValueError) as error:
            raise VendorDied(self._cause(), self._end()) from error
        if answer is None:
            raise VendorDied(self._cause(), self._end())
        header, values = answer
        if "error" in header:
            raise VendorError(*header["error"])
        return header, {entry[0]: value for entry, value in zip(header["arrays"], values, strict=True)}

    def printed(self) -> str:
        """Return what the process has printed so far, its end where that is long."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace").strip()[-_LOG_CHARACTERS:]

    def _cause(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=10)
            return f"It was killed by {signal.Signals(-code).name}" if code < 0 else f"It ended with code {code}"
        return "It sent what cannot be read"

    def _end(self) -> str:
        text = self.printed()
        self.close()  # a late answer must not be taken for that of the next call
        return text

    def close(self) -> None:
        """End the process; closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._requests.close()
        os.close(self._answer_end)
        self._log.close()


class _Answers:
    """The reading end of the pipe, as `vendor_side.read` wants it, with a limit on time."""

    def __init__(self, descriptor: int, deadline: float) -> None:
        self._descriptor, self._deadline = descriptor, deadline
        self._buffer = bytearray()

    def readline(self) -> bytes:
        """Return what is up to the next newline, empty at the end."""
        while (end := self._buffer.find(b"\n")) < 0:
            if not self._more(64):
                return b""
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def read(self, count: int) -> bytes:
        """Return so many bytes, fewer at the end."""
        while len(self._buffer) < count and self._more(count - len(self._buffer)):
            pass
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _more(self, wanted: int) -> bool:
        while True:
            readable, _, _ = select.select([self._descriptor], [], [], _POLL_S)
            if readable:
                chunk = os.read(self._descriptor, max(wanted, 1 << 16))
                self._buffer += chunk
                return bool(chunk)
            if time.monotonic() > self._deadline:
                raise TimeoutError
