"""The child process: results and errors come back, and whatever kills it leaves this process alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from accelrt import isolation
from accelrt.errors import CompileError, IncompatibleProgram, IsolatedError

HELPER = """
import os, sys, time
from accelrt.errors import IncompatibleProgram

def echo(**arguments): print("a line that is not the reply"); return arguments
def pid(): return os.getpid()
def sleep(seconds): time.sleep(seconds)
def leave(code): print("last words", file=sys.stderr, flush=True); os._exit(code)
def hoard(mebibytes):
    kept = bytearray(mebibytes << 20)
    time.sleep(30)
    return len(kept)
def refuse(): raise IncompatibleProgram("not mine", hint="take another", backend="cpu")
def fail(): raise KeyError("what")
"""


@pytest.fixture(autouse=True)
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh child that knows the helper: it has the path of the time it was started."""
    (tmp_path / "accelrt_test_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    isolation._stop()
    yield
    isolation._stop()


def call(function: str, **arguments: object) -> object:
    return isolation.call(f"accelrt_test_helper:{function}", **arguments)  # type: ignore[arg-type]


def test_arguments_and_result_travel_and_prints_do_not_disturb() -> None:
    data = {"a": [1, 2.5, None, "ü"], "b": {"c": True}, "d": "x" * 3_000_000}
    assert call("echo", **data) == data


def test_one_child_is_reused() -> None:
    pids = {call("pid") for _ in range(3)}
    assert len(pids) == 1
    assert pids != {os.getpid()}


def test_an_abort_is_an_error_and_the_next_call_works() -> None:
    with pytest.raises(IsolatedError, match="SIGABRT"):
        isolation.call("os:abort")
    assert call("echo", a=1) == {"a": 1}


def test_an_exit_tells_its_code_and_last_words() -> None:
    with pytest.raises(IsolatedError, match=r"code 3.*last words"):
        call("leave", code=3)


def test_a_hang_is_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(IsolatedError, match=r"stopped after 0\.3 s"):
        call("sleep", seconds=60, timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert call("echo", a=1) == {"a": 1}


def test_hoarding_is_stopped() -> None:
    call("pid")
    with pytest.raises(IsolatedError, match="its limit is 300 MiB"):
        call("hoard", mebibytes=500, memory_bytes=300 << 20, timeout_s=20)


def test_errors_keep_their_class() -> None:
    with pytest.raises(IncompatibleProgram) as caught:
        call("refuse")
    assert (caught.value.message, caught.value.hint, caught.value.backend) == ("not mine", "take another", "cpu")


def test_foreign_errors_become_compile_errors() -> None:
    with pytest.raises(CompileError, match="KeyError: 'what'"):
        call("fail")
    with pytest.raises(CompileError, match="No module named"):
        isolation.call("no_such_module_at_all:f")


def test_threads_take_turns() -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: call("echo", n=n), range(50)))
    assert replies == [{"n": n} for n in range(50)]
