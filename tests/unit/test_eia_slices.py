"""eia/remote on slices that a real server lends: borrowed, renewed, given back, refused, and kept apart."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")

from tests.contract.lenders import LenderProcess, lender, state_of, upload

import accelrt
from accelrt.errors import (
    AccelrtError,
    IncompatibleProgram,
    ModelNotFound,
    NotAllowed,
    OutOfDeviceMemory,
    Overloaded,
    RequestError,
)
from accelrt.protocol.leases import EXTENSION, PRECISION_EXTENSION, SLICE, content_name
from accelrt.registry import REGISTRY
from accelrt.testing.models import mlp, small_cnn
from accelrt_eia import EiaBackend

MODEL = small_cnn()
CNN, MLP = MODEL.SerializeToString(), mlp().SerializeToString()
IMAGE = {"image": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}
KEYS = tuple(f"{name}-{'k' * 20}" for name in ("first", "second"))


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[EiaBackend]:
    """A backend of the test's own, so that no connection and no health is remembered."""
    monkeypatch.delenv("ACCELRT_EIA_ACCELERATORS", raising=False)
    monkeypatch.delenv("ACCELRT_EIA_API_KEY", raising=False)
    fresh, original = EiaBackend(), type(REGISTRY).backend
    monkeypatch.setattr(
        type(REGISTRY), "backend", lambda registry, name: fresh if name == "eia" else original(registry, name)
    )
    yield fresh


@pytest.fixture
def open_server(lent: LenderProcess) -> Iterator[LenderProcess]:
    """A server without keys, of which nothing is lent before a test, nor after it."""
    yield lent
    lent.forget_clients()


@pytest.fixture(scope="module")
def lent() -> Iterator[LenderProcess]:
    """Four slices of 4 MiB."""
    with lender("--accelerator", "cpu:0", "--memory-mib", "4", "--concurrency", "2", "--slices", "4") as server:
        yield server


@pytest.fixture(scope="module")
def oracle() -> Any:
    with accelrt.load(MODEL, backend="cpu") as session:
        return session.predict(IMAGE)["scores"]


def test_a_session_borrows_a_slice_and_gives_it_back(
    open_server: LenderProcess, backend: EiaBackend, monkeypatch: pytest.MonkeyPatch, oracle: Any
) -> None:
    monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", open_server.url)
    (device,) = backend.devices()
    assert device.memory_bytes == 4 << 20
    assert "custom of cpu:0" in device.description
    watcher = open_server.client()
    assert {EXTENSION, PRECISION_EXTENSION} <= set(watcher.ask("ServerMetadata", 10).extensions)
    # Clients on the server's machine could read each other's regions.
    assert "system_shared_memory" not in watcher.ask("ServerMetadata", 10).extensions
    artifact = accelrt.compile(MODEL, "eia/remote", fallback="error")
    with accelrt.load(artifact, fallback="error") as session:
        np.testing.assert_allclose(session.predict(IMAGE)["scores"], oracle, rtol=1e-5, atol=1e-6)
        assert [holder.programs for holder in state_of(watcher).holders] == [1]
        with accelrt.load(artifact, fallback="error") as second:
            second.predict(IMAGE)
        # What another session of this process uses is kept.
        session.predict(IMAGE)
        assert session.stats().fallbacks == 0
        told = backend.report()["accelerators"][0]
        assert (told["type"], told["free_bytes"], told["leased"]) == ("custom", 3 << 20, True)
        assert len(backend.occupants()[0]) == 1
    assert state_of(watcher).holders == ()


def test_the_tool_describes_a_slice(open_server: LenderProcess) -> None:
    holder = open_server.client()
    upload(holder, content_name(CNN), CNN)
    environment = {**os.environ, "ACCELRT_EIA_ACCELERATORS": f"{open_server.url},grpc://127.0.0.1:1"}
    for flags in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "accelrt", "eia", "describe", *flags],
            capture_output=True, text=True, check=False, timeout=120, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if flags:
            lent, gone = json.loads(done.stdout)["devices"][:2]
            assert (lent["type"], lent["status"], lent["memory_bytes"]) == ("custom", "ready", 4 << 20)
            assert lent["free_bytes"] == 4 << 20  # of a slice of its own
            assert [one["programs"] for one in lent["holders"]] == [1]
            assert "cannot be reached" in gone["status"] and gone["holders"] is None
        else:
            for words in ("Type: custom", "Status: ready", "Memory: 4.2 MB, 4.2 MB free", "Lent: 1 of 4 slices"):
                assert words in done.stdout
            assert "Holder: " in done.stdout and "1 programs" in done.stdout


def test_beyond_the_quota_the_policy_decides(
    open_server: LenderProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", open_server.url)
    large = mlp(hidden=(1024, 1024), features=64)
    artifact = accelrt.compile(large, "eia/remote", fallback="error")
    with pytest.raises(OutOfDeviceMemory, match=rf"quota of {4 << 20} bytes") as refused:
        accelrt.load(artifact, fallback="error")
    assert "are held" in refused.value.message and "needs" in refused.value.message
    with accelrt.load(artifact, fallback="warn") as session:
        feeds = {port.name: np.zeros((1, 64), np.float32) for port in session.signature.inputs}
        session.predict(feeds)
    assert "quota" in caplog.text
    assert state_of(open_server.client()).holders == ()


def test_a_server_that_was_started_anew_gets_the_program_again(monkeypatch: pytest.MonkeyPatch, oracle: Any) -> None:
    with lender("--accelerator", "cpu:0", "--memory-mib", "4", "--slices", "1") as server:
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", server.url)
        options = {"lost_after_s": 600.0}
        with accelrt.load(accelrt.compile(MODEL, "eia/remote", options=options, fallback="error")) as session:
            session.predict(IMAGE)
            server.kill()
            np.testing.assert_allclose(session.predict(IMAGE)["scores"], oracle, rtol=1e-5, atol=1e-6)
            fallen = session.stats().fallbacks
            assert fallen >= 1
            server.start()
            deadline = time.monotonic() + 300
            while not state_of(server.client()).holders and time.monotonic() < deadline:
                np.testing.assert_allclose(session.predict(IMAGE)["scores"], oracle, rtol=1e-5, atol=1e-6)
                time.sleep(0.1)
            assert [holder.programs for holder in state_of(server.client()).holders] == [1]
        assert state_of(server.client()).holders == ()


def test_an_idle_session_keeps_its_lease_and_a_dead_client_loses_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with lender("--accelerator", "cpu:0", "--memory-mib", "4", "--slices", "2", "--lease-secs", "12") as server:
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", server.url)
        dead = server.client()
        upload(dead, content_name(CNN), CNN)
        with accelrt.load(accelrt.compile(MODEL, "eia/remote", fallback="error"), fallback="error") as session:
            session.predict(IMAGE)
            assert len(state_of(server.client()).holders) == 2
            deadline = time.monotonic() + 300
            while len(state_of(server.client()).holders) == 2 and time.monotonic() < deadline:
                time.sleep(0.5)
            # The silent one is gone, and the program that both held is still there for the other.
            assert len(state_of(server.client()).holders) == 1
            with pytest.raises(ModelNotFound):
                dead.ask("ModelStatistics", 10, name=content_name(CNN))
            session.predict(IMAGE)
            assert session.stats().fallbacks == 0


# Keys


def test_with_keys_a_slice_is_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--accelerator", "cpu:0", "--memory-mib", "4", "--slices", "2")
    with lender(*arguments, ACCELRT_API_KEYS=",".join(KEYS)) as server:
        name = content_name(CNN)
        with pytest.raises(NotAllowed):
            upload(server.client(), name, CNN)
        with pytest.raises(NotAllowed):
            upload(server.client(key="third-" + "k" * 20), name, CNN)
        mine = server.client(key=KEYS[0])
        upload(mine, name, CNN)
        # Another process with the key uploads nothing.
        assert server.client(key=KEYS[0]).ask("ModelReady", 10, name=name).ready
        # Whoever has another key does not get at it by any token, and has no more than one slice by all of them.
        for _ in range(20):
            other = server.client(key=KEYS[1], token=secrets.token_urlsafe(32))
            assert not other.ask("ModelReady", 10, name=name).ready
            other.ask("RepositoryModelLoad", 10, model_name=SLICE)
        assert len(state_of(mine).holders) == 2
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", server.url)
        monkeypatch.setenv("ACCELRT_EIA_API_KEY", KEYS[1])
        with accelrt.load(accelrt.compile(MODEL, "eia/remote", fallback="error"), fallback="error") as session:
            session.predict(IMAGE)


# Hostile clients


@pytest.mark.parametrize("token", ["short", "x" * 31, "x" * 129, "a b" * 20, "x" * 31 + "\x7f"])
def test_tokens_that_are_none(open_server: LenderProcess, token: str) -> None:
    client = open_server.client(token=token)
    with pytest.raises(AccelrtError):
        upload(client, content_name(CNN), CNN)
    assert state_of(open_server.client()).holders == ()


def test_clients_that_make_up_leases_get_no_more_than_there_are(open_server: LenderProcess) -> None:
    victim = open_server.client()
    upload(victim, content_name(CNN), CNN)
    lent, refused = [], 0
    for _ in range(40):
        one = open_server.client()
        try:
            one.ask("RepositoryModelLoad", 10, model_name=SLICE)
            lent.append(one)
        except Overloaded as error:
            refused += 1
            assert error.retry_after_s
    assert (len(lent), refused) == (3, 37)
    assert victim.ask("ModelReady", 10, name=content_name(CNN)).ready


def test_a_program_under_the_name_of_another(open_server: LenderProcess) -> None:
    client = open_server.client()
    with pytest.raises(RequestError, match=content_name(MLP)):
        upload(client, content_name(CNN), MLP)
    with pytest.raises(RequestError, match="as they are"):
        upload(client, content_name(CNN), CNN, instance_group=[{"count": 1000}])


def test_a_flood_of_calls_leaves_the_other_clients_their_turns(open_server: LenderProcess) -> None:
    from accelrt.protocol.wire import write_request

    name = content_name(CNN)
    clients = [open_server.client(), open_server.client()]
    for client in clients:
        upload(client, name, CNN)
    data = write_request(name, "", {"image": np.zeros((64, 3, 16, 16), np.float32)})
    path, stop, counts = "/inference.GRPCInferenceService/ModelInfer", threading.Event(), [0, 0]

    def flood() -> None:
        while not stop.is_set():
            try:
                clients[0].call(path, data, 60)
                counts[0] += 1
            except Overloaded:
                counts[1] += 1

    threads = [threading.Thread(target=flood) for _ in range(90)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):  # none of these is refused, whatever the other does
            clients[1].call(path, data, 120)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert counts[0] > 0
    assert counts[1] > 0
    # The calls that were refused hold nothing of the model, for which unloading would wait.
    for client in clients:
        client.ask("RepositoryModelUnload", 25, model_name=SLICE)
    assert state_of(clients[0]).holders == ()


# Precision


def test_a_precision_is_asked_for_confirmed_and_told(monkeypatch: pytest.MonkeyPatch, oracle: Any) -> None:
    pytest.importorskip("openvino")
    native = accelrt.compile(MODEL, "cpu/openvino", precision="bf16")
    if {segment.precision for segment in native.placement.segments} != {"bf16"}:
        pytest.skip("this CPU does not compute in bfloat16")
    with lender("--accelerator", "cpu/openvino:0", "--memory-mib", "8", "--slices", "1") as server:
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", server.url)
        artifact = accelrt.compile(MODEL, "eia/remote", precision="bf16", fallback="error")
        (segment,) = artifact.placement.segments
        assert (segment.engine, segment.precision) == ("eia/remote", "bf16")
        assert "by cpu/openvino in bf16" in segment.remark and server.url in segment.remark
        with accelrt.load(artifact, fallback="error") as session:
            scores = session.predict(IMAGE)["scores"]
        error = np.abs(scores - oracle).max()
        assert 1e-6 < error < 2e-2  # it was rounded, and to bfloat16
        # What the server cannot do it does not get to do in another precision unsaid.
        artifact = accelrt.compile(MODEL, "eia/remote", precision="fp16", fallback="error")
        assert "asked to compute in fp16" in artifact.placement.segments[0].remark
        with pytest.raises(IncompatibleProgram, match="in fp32"):
            accelrt.load(artifact, fallback="error")
        with accelrt.load(artifact, fallback="allow") as session:
            np.testing.assert_allclose(session.predict(IMAGE)["scores"], oracle, rtol=1e-5, atol=1e-6)
