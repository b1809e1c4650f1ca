"""Models in processes of their own: frames, crashes, hangs, restarts; the server lives and answers for the others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.serve_cases import ask, line, put, request, run, settled

import accelrt
from accelrt.errors import ExecutionError, InputError, ModelUnavailable
from accelrt.registry import REGISTRY, find_engine
from accelrt.serve.interface import InferRequest
from accelrt.serve.models import ModelService, ModelSettings, ServiceSettings, frames
from accelrt.serve.models.loading import wants_process

PLUGIN = """
import os, signal, time
from accelrt.testing.fake import FakeBackend

def distorts(kinds, outputs):
    first = float(next(iter(outputs.values())).flat[0])
    if first == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)  # another thread may be the one that takes the signal
    if first == 14:
        time.sleep(3600)
    if first == 15:
        os._exit(7)
    return outputs

Crash = FakeBackend.configured("crash", distorts=distorts, parallelism=4)
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a backend that crashes, hangs or exits for certain answers, as a plug-in; return a folder for models."""
    (tmp_path / "accelrt_crash.py").write_text(PLUGIN)
    info = tmp_path / "accelrt_crash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: accelrt-crash\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[accelrt.backends]\ncrash = accelrt_crash:Crash\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    # As in a process that starts now; put back as it was afterwards.
    monkeypatch.setattr(REGISTRY, "_points", None)
    monkeypatch.setattr(REGISTRY, "_plugins", {})
    monkeypatch.setattr(REGISTRY, "_backends", dict(REGISTRY._backends))
    yield tmp_path / "root"
    sys.modules.pop("accelrt_crash", None)


def isolated(root: Path, **more: Any) -> ModelService:
    own = ModelSettings(isolation="process", **more)
    return ModelService(ServiceSettings((root,), defaults=own, load_wait_s=60.0, drain_s=10.0))


def test_a_crash_fails_its_requests_and_nothing_else(crashing: Path) -> None:
    put(crashing / "bad.onnx", line(1))
    put(crashing / "good.onnx", line(2))
    (crashing / "bad.accelrt.json").write_text(
        '{"backend": "crash", "isolation": "process", "max_batch_size": 1, "hang_timeout_s": 2}'
    )

    async def scenario() -> None:
        async with ModelService(ServiceSettings((crashing,), load_wait_s=60.0)) as served:
            assert served.ready()
            np.testing.assert_array_equal((await ask(served, "bad", request(5, 1))).outputs["y"], [[5, 1]])
            for deadly, words in ((13, "SIGSEGV"), (15, "code 7"), (14, "did not answer within 2 s")):
                model = await served.model("bad")
                assert model.infer_now(request(5, 1)) is None  # it could hold up the event loop
                before = served.snapshot()[0].pid
                doomed = asyncio.create_task(model.infer(request(deadly, 1)))
                with pytest.raises(ModelUnavailable, match=words) as error:
                    await doomed
                assert error.value.retry_after_s is not None
                np.testing.assert_array_equal((await ask(served, "good", request(5, 1))).outputs["y"], [[10, 2]])
                entry = served.index()[0]
                if entry.state == "UNAVAILABLE":  # it may be back already
                    assert words in entry.reason and not served.ready()
                await settled(lambda: served.find("bad") is not None, 60)
                assert served.index()[0].reason == "" and served.snapshot()[0].pid != before
                np.testing.assert_array_equal((await ask(served, "bad", request(6, 1))).outputs["y"], [[6, 1]])
            assert served.snapshot()[0].restarts == 3

    run(scenario())


def test_while_it_is_down_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        async with isolated(tmp_path) as served:
            model = await served.model("a")
            pid = served.snapshot()[0].pid
            assert pid is not None and pid != os.getpid() and served.snapshot()[0].resident_bytes > 1 << 20
            os.kill(pid, signal.SIGKILL)
            await settled(lambda: served.find("a") is None)
            with pytest.raises(ModelUnavailable, match="SIGKILL") as error:
                await served.model("a")
            assert error.value.retry_after_s is not None
            with pytest.raises(ModelUnavailable):
                await model.infer(request(1, 1))
            await settled(lambda: served.find("a") is not None, 60)
            assert (await model.infer(request(3, 1))).outputs["y"][0, 0] == 6
            held = served.snapshot()[0].pid
            assert held is not None
            del model
        with pytest.raises(ProcessLookupError):
            os.kill(held, 0)

    run(scenario())


def test_many_calls_are_under_way_at_once_and_errors_come_back_as_they_are(crashing: Path) -> None:
    put(crashing / "a.onnx", line(2))
    (crashing / "a.accelrt.json").write_text('{"workers": 4, "max_batch_size": 1}')

    async def scenario() -> None:
        async with isolated(crashing) as served:
            model = await served.model("a")
            answers = await asyncio.gather(*(model.infer(request(number, 1)) for number in range(200)))
            assert [answer.outputs["y"][0, 0] for answer in answers] == [2 * number for number in range(200)]
            large = np.arange(2_000_000, dtype=np.float32).reshape(-1, 2)
            wide = await asyncio.gather(*(model.infer(InferRequest({"x": large + number})) for number in range(6)))
            for number, answer in enumerate(wide):
                np.testing.assert_array_equal(answer.outputs["y"], (large + number) * 2)
            with pytest.raises(InputError):
                await model.infer(InferRequest({"x": np.zeros((1, 5), np.float32)}))

    run(scenario())


def test_swapping_and_unloading_ends_the_process(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    own = ModelSettings(isolation="process")

    async def scenario() -> None:
        async with ModelService(
            ServiceSettings((tmp_path,), control="explicit", load_models=("a",), defaults=own)
        ) as served:
            first = served.snapshot()[0].pid
            assert first is not None
            put(tmp_path / "a.onnx", line(3))
            await served.load("a", {})
            assert (await ask(served, "a", request(3, 1))).outputs["y"][0, 0] == 9
            second = served.snapshot()[0].pid
            assert second is not None and second != first
            await served.unload("a")
            for pid in (first, second):
                await settled(lambda pid=pid: not Path(f"/proc/{pid}").exists())

    run(scenario())


def test_what_cannot_be_loaded_in_the_worker_says_why(crashing: Path) -> None:
    put(crashing / "a.onnx", line(2))
    (crashing / "a.accelrt.json").write_text('{"isolation": "process", "devices": "77"}')

    async def scenario() -> None:
        async with ModelService(ServiceSettings((crashing,))) as served:
            entry = served.index()[0]
            assert entry.state == "UNAVAILABLE" and "77" in entry.reason

    run(scenario())


@pytest.mark.parametrize(
    ("isolation", "runs_code", "exclusive", "expected"),
    [
        (None, False, False, False),
        (None, True, False, True),
        ("auto", True, False, True),
        ("auto", True, True, False),
        ("none", True, False, False),
        ("process", False, True, True),
    ],
)
def test_programs_that_run_code_get_a_process(
    monkeypatch: pytest.MonkeyPatch, isolation: Any, runs_code: bool, exclusive: bool, expected: bool
) -> None:
    artifact = accelrt.compile(line(2))
    backend = REGISTRY.backend("cpu")
    engine = find_engine(backend, "onnxruntime")
    monkeypatch.setattr(type(engine), "caps", replace(engine.caps, executes_code=runs_code))
    monkeypatch.setattr(type(backend), "exclusive", exclusive)
    assert wants_process(artifact, ModelSettings(isolation=isolation)) is expected


# Frames

dtypes = st.sampled_from(
    ["float32", "float64", "int8", "uint16", "int64", "bool", "float16", "bfloat16", "int4", "complex64"]
)


@st.composite
def arrays(draw: Any) -> Any:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if draw(st.integers(0, 4)) == 0:
        texts = np.empty(shape, object)
        for index in range(texts.size):
            texts.flat[index] = draw(st.text(max_size=5))
        return texts
    name = draw(dtypes)
    dtype = np.dtype(getattr(ml_dtypes, name)) if name in ("bfloat16", "int4") else np.dtype(name)
    return np.asarray(np.arange(int(np.prod(shape))).reshape(shape) % 7).astype(dtype)


values = st.recursive(st.one_of(st.none(), arrays()), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@given(st.dictionaries(st.text(max_size=6), values, max_size=4), st.integers(0, 2**60))
@settings(max_examples=150, deadline=None)
def test_frames_carry_every_value(sent: dict[str, Any], number: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=frames.send, args=(ours, {"id": number}, sent))
        sender.start()
        received = frames.receive(theirs)
        sender.join()
    assert received is not None and received[0] == {"id": number}

    def same(a: Any, b: Any) -> None:
        if isinstance(a, list):
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                same(one, other)
        elif a is None:
            assert b is None
        else:
            assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
            assert b.size == 0 or b.dtype == object or b.flags.aligned

    assert list(received[1]) == list(sent)
    for name in sent:
        same(sent[name], received[1][name])


@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.binary(max_size=80), st.integers(0, 100)).map(
            lambda pair: len(pair[0]).to_bytes(4, "little") + pair[1].to_bytes(8, "little") + pair[0] + bytes(pair[1])
        ),
    )
)
@settings(max_examples=200, deadline=None)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        with contextlib.suppress(frames.BrokenFrame):
            frames.receive(theirs)


@pytest.mark.parametrize(
    "head",
    [
        b'{"values": {"x": {"dtype": "float32", "shape": [1000000000, 1000000000]}}}',
        b'{"values": {"x": {"dtype": "float32", "shape": [-1]}}}',
        b'{"values": {"x": {"dtype": "object", "shape": [0]}}}',
        b'{"values": {"x": {"dtype": "string", "shape": [9], "bytes": 0}}}',
        b'{"values": {"x": 3}}',
        b'{"values": 3}',
        b"[" * 5000,
    ],
)
def test_hostile_heads(head: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(len(head).to_bytes(4, "little") + (0).to_bytes(8, "little") + head)
        with pytest.raises(frames.BrokenFrame):
            frames.receive(theirs)


def test_errors_keep_their_class() -> None:
    error = frames.error_from_json(frames.error_to_json(InputError("no", hint="yes", backend="b")))
    assert type(error) is InputError and (error.message, error.hint, error.backend) == ("no", "yes", "b")
    foreign = frames.error_from_json(frames.error_to_json(ValueError("odd")))
    assert type(foreign) is ExecutionError and "ValueError: odd" in foreign.message
    assert type(frames.error_from_json({"type": "os.system", "message": "x"})) is ExecutionError
