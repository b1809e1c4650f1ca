"""The models of a server with real sessions: loading, swapping, unloading, room for others; and no request lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.unit.serve_cases import ask, coupled, line, put, request, run, settled

import accelrt
from accelrt.errors import (
    InputError,
    ModelNotFound,
    ModelUnavailable,
    NotAllowed,
    Overloaded,
    RequestError,
    RequestTimeout,
)
from accelrt.serve.interface import InferRequest, Service
from accelrt.serve.models import ModelService, ModelSettings, ServiceSettings
from accelrt.serve.models.lifecycle import NOT_RESIDENT
from accelrt.serve.models.residency import Residency, Resident, choose_victim
from accelrt.serve.models.served import DirectGate, LiveModel, Loads
from accelrt.serve.models.uploads import Uploads


def service(root: Path, **more: Any) -> ModelService:
    return ModelService(ServiceSettings((root,), **{"drain_s": 10.0, "load_wait_s": 30.0, **more}))


def states(served: ModelService) -> dict[str, str]:
    return {f"{entry.name}:{entry.version}": entry.state for entry in served.index()}


def test_models_of_a_folder_answer(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    put(tmp_path / "b" / "1" / "model.onnx", line(3))
    accelrt.compile(line(4)).save(tmp_path / "c.accel")

    async def scenario() -> None:
        async with service(tmp_path) as served:
            checked: Service = served  # the agreement holds for the type checker too
            assert checked.live() and checked.ready()
            for name, slope in (("a", 2), ("b", 3), ("c", 4)):
                answer = await ask(served, name, request(5, 1, id="7"))
                assert (answer.model_name, answer.model_version, answer.id) == (name, "1", "7")
                np.testing.assert_array_equal(answer.outputs["y"], [[5 * slope, slope]])
            model = await served.model("a", "1")
            assert model.metadata.inputs[0].shape == (-1, 2) and model.metadata.platform == "accelrt_cpu/onnxruntime"
            assert model.config["max_batch_size"] == 32 and model.config["input"][0]["dims"] == [2]
            assert json.loads(json.dumps(model.config)) == model.config
            for name, version in (("x", ""), ("a", "2"), ("../a", "")):
                assert served.find(name, version) is None
                with pytest.raises(ModelNotFound):
                    await served.model(name, version)
            with pytest.raises(NotAllowed):
                await served.load("a", {})
            with pytest.raises(NotAllowed):
                await served.unload("a")
        assert not served.live() and not served.ready()
        with pytest.raises(ModelUnavailable):
            await served.model("a")

    run(scenario())


def test_requests_that_do_not_fit_are_told_so_by_both_ways(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    fit = np.zeros((1, 2), np.float32)

    async def scenario() -> None:
        async with service(tmp_path) as served:
            model = await served.model("a")
            for inputs in (
                {},
                {"x": fit, "z": fit},
                {"x": fit.astype(np.float64)},
                {"x": np.zeros((1, 3), np.float32)},
                {"x": np.zeros(2, np.float32)},
            ):
                with pytest.raises(InputError, match=r"x|z"):
                    assert model.infer_now(InferRequest(dict(inputs))) is None
                    raise InputError("x")  # the short way was closed
                with pytest.raises(InputError):
                    await model.infer(InferRequest(dict(inputs)))
            for way in (model.infer_now, model.infer):
                with pytest.raises(RequestError, match="'q'"):
                    result = way(request(1, 2, outputs=["y", "q"]))
                    if asyncio.iscoroutine(result):
                        await result
            assert list((await model.infer(request(1, 2, outputs=["y"]))).outputs) == ["y"]
            assert (await model.infer(request(1, 2, outputs=[]))).outputs == {}

    run(scenario())


def test_only_what_is_asked_for_is_returned_in_that_order(tmp_path: Path) -> None:
    from accelrt.testing.models import Builder

    net = Builder("two", 0)
    x = net.input("x", ("batch", 2))
    net.output(net.node("Neg", x, name="first"), ("batch", 2))
    net.output(net.node("Abs", x, name="second"), ("batch", 2))
    put(tmp_path / "a.onnx", net.model())

    async def scenario() -> None:
        async with service(tmp_path) as served:
            model = await served.model("a")
            for asked, names in (
                (None, ["first", "second"]),
                (["second"], ["second"]),
                (["second", "first"], ["second", "first"]),
            ):
                assert list((await model.infer(request(1, 2, outputs=asked))).outputs) == names
                direct = model.infer_now(request(1, 2, outputs=asked))
                assert direct is None or list(direct.outputs) == names

    run(scenario())


def test_fast_models_are_answered_at_once_and_slow_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        async with service(tmp_path, direct_us=1e6) as served:
            model = await served.model("a")
            assert model.infer_now(request(1, 2)) is not None
            # Larger inputs than any that were seen have to show in the queue that they are fast.
            assert model.infer_now(request(1, 2, rows=1000)) is None
            await model.infer(request(1, 2, rows=1000))
            assert model.infer_now(request(1, 2, rows=1000)) is not None
            read = served.statistics("a")[0]
            assert read.success.count == 3 and read.inference_count == 2001 and set(read.batches) == {1, 1000}
            assert read.last_inference_ms / 1000 == pytest.approx(time.time(), abs=5)
        async with service(tmp_path, direct_us=0) as served:
            assert (await served.model("a")).infer_now(request(1, 2)) is None

    run(scenario())


def test_the_gate_follows_the_95th_percentile() -> None:
    gate = DirectGate(200)
    gate.open_after(8, 50_000)
    generator = np.random.default_rng(0)

    def calls(count: int, slow: float) -> int:
        closed = 0
        for _ in range(count):
            if generator.random() < slow:
                gate.slow(8, 1_000_000)
            elif gate.score:
                gate.score -= 1
            closed += gate.score > 100
        return closed

    assert calls(5000, 0.02) < 100  # one in fifty is slow
    assert calls(5000, 0.12) > 2000  # more than one in twenty
    for _ in range(400):
        gate.learn(8, 50_000)
    assert gate.score == 0


def test_rows_that_may_meet_are_never_batched(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", coupled())
    (tmp_path / "a" / "accelrt.json").write_text('{"max_batch_size": 8, "max_queue_delay_us": 20000}')

    async def scenario() -> None:
        async with service(tmp_path, direct_us=0) as served:
            model = await served.model("a")
            answers = await asyncio.gather(*(model.infer(request(number, 0)) for number in range(20)))
            for number, answer in enumerate(answers):
                np.testing.assert_array_equal(answer.outputs["y"], [[0, -number]])
            entry = served.index()[0]
            assert "do not share runs" in entry.reason and "ReduceMax" in entry.reason
            assert model.config["max_batch_size"] == 0 and "dynamic_batching" not in model.config
            assert "ReduceMax" in model.config["parameters"]["accelrt.batching"]["string_value"]

    run(scenario())


def test_tritons_configuration_is_honoured(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        put(tmp_path / "a" / str(version) / "model.onnx", line(version))
    (tmp_path / "a" / "config.pbtxt").write_text(
        """name: "a" max_batch_size: 4 version_policy { specific { versions: [1, 3] } }
        input { name: "x" data_type: TYPE_FP32 dims: [2, 1] reshape { shape: [2] } }
        output { name: "y" data_type: TYPE_FP32 dims: [1, 2] reshape { shape: [2] } }
        instance_group { count: 2 } optimization { priority: PRIORITY_MAX }
        dynamic_batching { max_queue_delay_microseconds: 50 default_queue_policy { max_queue_size: 9 } }
        model_warmup { name: "w" batch_size: 2 inputs { key: "x" value { data_type: TYPE_FP32 dims: [2, 1] zero_data: true } } }"""
    )

    async def scenario() -> None:
        async with service(tmp_path) as served:
            assert states(served) == {"a:1": "READY", "a:3": "READY"}
            model = await served.model("a")
            assert model.version == "3" and model.metadata.inputs[0].shape == (-1, 2, 1)
            assert model.metadata.outputs[0].shape == (-1, 1, 2)
            asked = InferRequest({"x": np.array([[[5], [1]]], np.float32)})
            answers = await asyncio.gather(*(model.infer(asked) for _ in range(9)))
            assert all(answer.outputs["y"].tolist() == [[[15, 3]]] for answer in answers)
            with pytest.raises(InputError):
                await model.infer(request(1, 2))
            told = model.config
            assert told["max_batch_size"] == 4 and told["instance_group"][0]["count"] == 2
            assert told["input"][0] == {
                "name": "x",
                "data_type": "TYPE_FP32",
                "dims": [2, 1],
                "reshape": {"shape": [2]},
            }
            assert told["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 9
            assert "optimization" in served.index()[0].reason

    run(scenario())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('input { name: "z" data_type: TYPE_FP32 dims: [2] }', "'z'"),
        ('input { name: "x" data_type: TYPE_INT8 dims: [-1, 2] }', "int8"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [-1, 3] }', "shape"),
        ('max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [-1, 2] }', "shape"),
        ('model_warmup { name: "w" inputs { key: "z" value { data_type: TYPE_FP32 dims: [1, 2] } } }', "unknown: 'z'"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model(tmp_path: Path, text: str, why: str) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", line(2))
    (tmp_path / "a" / "config.pbtxt").write_text(text)

    async def scenario() -> None:
        async with service(tmp_path) as served:
            assert states(served) == {"a:1": "UNAVAILABLE"} and why in served.index()[0].reason
            assert not served.ready()
            with pytest.raises(ModelUnavailable, match="a"):
                await served.model("a")

    run(scenario())


def test_a_model_that_does_not_load_leaves_the_others_alone(tmp_path: Path) -> None:
    put(tmp_path / "good.onnx", line(2))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "bad.accel").write_bytes(b"no artifact")
    (tmp_path / "worse.accel").write_bytes(b"no artifact")

    async def scenario() -> None:
        async with service(tmp_path) as served:
            assert states(served) == {"bad:": "UNAVAILABLE", "good:1": "READY", "worse:1": "UNAVAILABLE"}
            assert "of one name" in served.index()[0].reason and served.index()[2].reason
            assert [entry.name for entry in served.index(ready=True)] == ["good"]
            assert not served.ready()
            await ask(served, "good", request(1, 2))

    run(scenario())


def test_explicit_loading_swapping_and_unloading(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    put(tmp_path / "b.onnx", line(3))

    async def scenario() -> None:
        async with service(tmp_path, control="explicit", load_models=("a",)) as served:
            assert states(served) == {"a:1": "READY", "b:": "UNAVAILABLE"} and served.ready()
            with pytest.raises(ModelUnavailable):
                await served.model("b")
            await served.load("b", {})
            assert (await ask(served, "b", request(1, 2))).outputs["y"][0, 0] == 3
            put(tmp_path / "b.onnx", line(5))
            held = await served.model("b")
            await served.load("b", {})
            assert (await ask(served, "b", request(1, 2))).outputs["y"][0, 0] == 5
            assert (await held.infer(request(1, 2))).outputs["y"][0, 0] == 3  # whoever found it is answered by it
            del held
            (tmp_path / "b.onnx").write_bytes(b"rubbish")
            with pytest.raises(RequestError, match="'b'"):
                await served.load("b", {})
            assert (await ask(served, "b", request(1, 2))).outputs["y"][0, 0] == 5
            assert "last load failed" in served.index(ready=True)[1].reason
            await served.unload("b")
            assert states(served)["b:1"] == "UNAVAILABLE" and served.find("b") is None and served.ready()
            with pytest.raises(ModelUnavailable):
                await served.model("b")
            put(tmp_path / "new.onnx", line(7))
            await served.load("new", {})
            assert (await ask(served, "new", request(1, 2))).outputs["y"][0, 0] == 7
            for name in ("gone", "..", "a/../a"):
                with pytest.raises(ModelNotFound):
                    await served.load(name, {})
            with pytest.raises(ModelNotFound):
                await served.unload("gone")
            assert "gone:" not in states(served)

    run(scenario())


def test_models_to_load_must_be_there(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        with pytest.raises(ModelNotFound, match="Did you mean 'a'"):
            async with service(tmp_path, control="explicit", load_models=("aa",)):
                pass

    run(scenario())


def test_loading_is_single_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.onnx", line(2))
    from accelrt.serve.models import lifecycle as module

    opened: list[str] = []
    real = module.open_version

    def counted(name: str, *rest: Any, **more: Any) -> Any:
        opened.append(name)
        time.sleep(0.1)
        return real(name, *rest, **more)

    monkeypatch.setattr(module, "open_version", counted)

    async def scenario() -> None:
        async with service(tmp_path, control="explicit") as served:
            await asyncio.gather(*(served.load("a", {}) for _ in range(20)))
            assert len(opened) <= 2  # one that had begun, and one for all who asked after that
            await served.unload("a")
        opened.clear()
        async with service(tmp_path, max_resident_models=1) as served:
            slot = served._entries["a"].slots["1"]
            served._lifecycle._evict(slot, slot.token)
            answers = await asyncio.gather(*(ask(served, "a", request(number, 0)) for number in range(50)))
            assert [answer.outputs["y"][0, 0] for answer in answers] == [2 * number for number in range(50)]
            assert len(opened) == 2

    run(scenario())


def test_a_load_with_files_and_a_configuration_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(root / "a.onnx", line(2))
    data = line(9).SerializeToString()

    async def scenario() -> None:
        async with service(root, control="explicit", load_models=("a",)) as served:
            await served.load("sent", {"file:1/model.onnx": data, "file:3/model.onnx": line(3).SerializeToString()})
            assert (await ask(served, "sent", request(1, 2))).model_version == "3"
            policy = json.dumps({"version_policy": {"all": {}}, "max_batch_size": 2, "dynamic_batching": {}})
            await served.load("sent", {"config": policy, "file:1/model.onnx": data, "file:2/model.onnx": data})
            assert {key for key in states(served) if key.startswith("sent")} == {"sent:1", "sent:2"}
            assert (await ask(served, "sent", request(1, 2), "1")).outputs["y"][0, 0] == 9
            assert (await served.model("sent")).config["max_batch_size"] == 2
            await served.load("a", {"file:1/model.onnx": data})
            assert (await ask(served, "a", request(1, 2))).outputs["y"][0, 0] == 9
            await served.load("a", {})
            assert (await ask(served, "a", request(1, 2))).outputs["y"][0, 0] == 2
            content = served._uploads._folder
            assert content is not None and any((content / "content").iterdir())
            await served.unload("sent")
            await settled(lambda: not any((content / "content").iterdir()))
            assert "sent:1" not in states(served) and states(served)["a:1"] == "READY"
            for wrong in (
                {"config": "{"},
                {"config": 3},
                {"speed": "high"},
                {"file:1/model.onnx": "text"},
                {"file:../model.onnx": data},
                {"file:1/model.onnx": b"rubbish"},
                {"file:1/readme": b"rubbish"},
                {"config": '{"name": "other"}', "file:1/model.onnx": data},
                {"config": '{"version_policy": {"specific": {"versions": [5]}}}', "file:1/model.onnx": data},
            ):
                with pytest.raises(RequestError):
                    await served.load("sent", wrong)
            with pytest.raises(ModelNotFound):
                await served.load("nothing", {"config": "{}"})
        assert not content.exists()

    run(scenario())


def test_uploads_that_could_run_code_are_refused(tmp_path: Path) -> None:
    import io
    import pickle
    import zipfile

    put(tmp_path / "a.onnx", line(2))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in (
            ("m/data.pkl", pickle.dumps(1)),
            ("m/version", b"3"),
            ("m/constants.pkl", pickle.dumps(1)),
            ("m/code/x.py", b""),
        ):
            file.writestr(name, data)

    async def scenario() -> None:
        async with service(tmp_path, control="explicit") as served:
            for name, data in (
                ("model.onnx", archive.getvalue()),
                ("model.onnx", pickle.dumps({"a": 1})),
                ("model.pt", archive.getvalue()),
                ("model.keras", b"x"),
            ):
                with pytest.raises(RequestError, match="may run code"):
                    await served.load("sent", {f"file:1/{name}": data})

    run(scenario())


def test_the_folder_is_followed(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        async with service(tmp_path, control="poll", poll_s=0.05) as served:
            put(tmp_path / "b" / "1" / "model.onnx", line(3))
            await settled(lambda: served.find("b") is not None)
            before = served.find("b")
            put(tmp_path / "b" / "2" / "model.onnx", line(4))
            await settled(lambda: served.find("b", "2") is not None and served.find("b", "1") is None)
            assert before is not None and before.version == "1"
            assert (await before.infer(request(1, 2))).outputs["y"][0, 0] == 3
            del before
            put(tmp_path / "a.onnx", line(8))
            old = served.find("a")
            await settled(lambda: served.find("a") is not old)
            assert (await ask(served, "a", request(1, 2))).outputs["y"][0, 0] == 8
            (tmp_path / "c.onnx").write_bytes(b"rubbish")
            await settled(lambda: states(served).get("c:1") == "UNAVAILABLE")
            put(tmp_path / "c.onnx", line(6))
            await settled(lambda: served.find("c") is not None)
            (tmp_path / "a.onnx").unlink()
            await settled(lambda: "a:1" not in states(served))
            with pytest.raises(ModelNotFound):
                await served.model("a")

    run(scenario())


def test_a_model_that_did_not_change_is_not_loaded_again(tmp_path: Path) -> None:
    for version in (1, 2):
        put(tmp_path / "a" / str(version) / "model.onnx", line(version))
    (tmp_path / "a" / "config.pbtxt").write_text("version_policy { all { } }")

    async def scenario() -> None:
        async with service(tmp_path, control="poll", poll_s=0.05) as served:
            first = served.find("a", "1")
            put(tmp_path / "a" / "3" / "model.onnx", line(3))
            await settled(lambda: served.find("a", "3") is not None)
            assert served.find("a", "1") is first

    run(scenario())


# Room


def test_more_models_than_fit_take_turns(tmp_path: Path) -> None:
    for number in range(6):
        put(tmp_path / f"m{number}.onnx", line(number + 1))
    (tmp_path / "m0.accelrt.json").write_text('{"pinned": true}')

    async def scenario() -> None:
        async with service(tmp_path, max_resident_models=2) as served:
            assert served.ready() and served.residency.count <= 2
            assert sum(row.state == "READY" for row in served.snapshot()) == 2
            assert {entry.state for entry in served.index()} == {"READY"}
            assert sum(entry.reason == NOT_RESIDENT for entry in served.index()) == 4
            pinned = served.find("m0")
            assert pinned is not None
            for _ in range(3):
                for number in range(6):
                    answer = await ask(served, f"m{number}", request(5, 1))
                    assert answer.outputs["y"].tolist() == [[5 * (number + 1), number + 1]]
                    assert served.residency.count <= 2
            assert served.find("m0") is pinned and served.residency.evictions > 6
            assert served.statistics("m5")[0].success.count == 3  # counts outlive being unloaded
            snapshot = {row.name: row for row in served.snapshot()}
            assert snapshot["m0"].pinned and snapshot["m0"].engines == ("cpu/onnxruntime",)
            assert sum(row.resident_bytes > 0 for row in snapshot.values()) <= 2

    run(scenario())


def test_a_model_too_large_is_told_so(tmp_path: Path) -> None:
    put(tmp_path / "small.onnx", line(2))
    put(tmp_path / "large.onnx", line(2, 300_000))

    async def scenario() -> None:
        async with service(tmp_path, max_resident_bytes=1_000_000) as served:
            assert states(served) == {"small:1": "READY", "large:1": "UNAVAILABLE"}
            with pytest.raises(ModelUnavailable, match="1000000 may be in memory"):
                await served.model("large")

    run(scenario())


def test_busy_and_pinned_models_are_not_unloaded_and_requests_wait_no_longer_than_they_should(tmp_path: Path) -> None:
    for name in ("pinned", "other"):
        put(tmp_path / f"{name}.onnx", line(2))
    (tmp_path / "pinned.accelrt.json").write_text('{"pinned": true}')

    async def scenario() -> None:
        async with service(tmp_path, max_resident_models=1, load_wait_s=0.3) as served:
            assert {row.name: row.state for row in served.snapshot()} == {"pinned": "READY", "other": "UNAVAILABLE"}
            start = time.monotonic()
            with pytest.raises(ModelUnavailable) as error:
                await served.model("other")
            assert error.value.retry_after_s is not None and 0.2 < time.monotonic() - start < 5
            await ask(served, "pinned", request(1, 2))

    run(scenario())


residents = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99)), max_size=12
)


@given(residents)
@settings(max_examples=200, deadline=None)
def test_who_makes_room_is_neither_pinned_nor_busy_and_the_least_recently_used(rows: Sequence[tuple[Any, ...]]) -> None:
    made = []
    for number, (pinned, idle, leaving, loading, used) in enumerate(rows):
        one = Resident(str(number), 1, pinned, leaving=leaving)
        if not loading:
            one.idle, one.last_used_ns, one.evict = (lambda idle=idle: idle), (lambda used=used: used), lambda: None
        made.append(one)
    able = [used for pinned, idle, leaving, loading, used in rows if idle and not (pinned or leaving or loading)]
    victim = choose_victim(made)
    assert (victim is None) == (not able)
    if victim is not None:
        pinned, idle, leaving, loading, used = rows[int(victim.name)]
        assert idle and not pinned and not leaving and not loading and used == min(able)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(40, 90),
)
@settings(max_examples=50, deadline=None)
def test_there_is_never_more_in_memory_than_allowed(
    loads: Sequence[tuple[int, bool]], most: int, most_bytes: int
) -> None:
    residency = Residency(most, most_bytes)
    clock = iter(range(1000))
    for size, pinned in loads:
        token = object()
        try:
            residency.reserve(token, Resident("m", size), wait_s=0.0 if pinned else 0.01, evict=True)
        except ModelUnavailable:
            continue
        used = next(clock)
        residency.settle(
            token,
            Resident(
                "m", size, pinned, lambda: True, lambda used=used: used, lambda token=token: residency.release(token)
            ),
        )
        assert residency.count <= most and residency.total_bytes <= most_bytes


# Nothing is lost


steps = st.lists(
    st.tuples(st.sampled_from(["load", "unload", "swap", "evict", "pause"]), st.integers(0, 2), st.floats(0, 0.004)),
    min_size=3,
    max_size=14,
)


@given(steps, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e6]))
@settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_request_is_lost_or_swapped_while_models_come_and_go(
    tmp_path_factory: pytest.TempPathFactory, plan: Sequence[tuple[str, int, float]], seed: int, direct_us: float
) -> None:
    """Each answer is that of its own model to its own question, by a version that was there; or a refusal in words."""
    root = tmp_path_factory.mktemp("repository")
    slopes = {f"m{number}": [number + 2.0] for number in range(3)}
    for name, known in slopes.items():
        put(root / f"{name}.onnx", line(known[0]))

    async def scenario() -> None:
        generator = np.random.default_rng(seed)
        async with service(
            root, control="explicit", load_models=("*",), max_resident_models=2, direct_us=direct_us
        ) as served:
            over, unloaded, answered = False, set[str](), 0

            async def client(number: int) -> None:
                nonlocal answered
                count = 0
                while not over or count < 5:
                    count += 1
                    name = f"m{generator.integers(3)}"
                    value, rows = float(number * 100 + count), int(generator.integers(1, 4))
                    was_loaded = name not in unloaded
                    try:
                        answer = await ask(served, name, request(value, 1, rows=rows))
                    except ModelUnavailable:
                        assert not was_loaded or name in unloaded or name in touched, name
                        await asyncio.sleep(0.001)
                        continue
                    y = answer.outputs["y"]
                    assert answer.model_name == name and y.shape == (rows, 2)
                    assert y[0, 1] in slopes[name] and (y == [value * y[0, 1], y[0, 1]]).all()
                    answered += 1
                    if generator.random() < 0.3:
                        await asyncio.sleep(0.001)

            touched: set[str] = set()
            clients = [asyncio.create_task(client(number)) for number in range(6)]
            for action, index, pause in plan:
                name = f"m{index}"
                if action == "swap":
                    slopes[name].append(slopes[name][-1] + 10)
                    put(root / f"{name}.onnx", line(slopes[name][-1]))
                if action in ("load", "swap"):
                    await served.load(name, {})
                    unloaded.discard(name)
                elif action == "unload":
                    touched.add(name)
                    unloaded.add(name)
                    await served.unload(name)
                elif action == "evict":
                    slot = served._entries[name].slots.get("1")
                    if slot is not None and slot.token is not None:
                        served._lifecycle._evict(slot, slot.token)
                await asyncio.sleep(pause)
            for name in sorted(unloaded):
                await served.load(name, {})
                unloaded.discard(name)
            over = True
            await asyncio.gather(*clients)
            assert answered >= 6
            for name, known in slopes.items():  # what was loaded last answers
                assert (await ask(served, name, request(1, 1))).outputs["y"][0, 0] == known[-1]
            assert served.residency.count <= 4  # two, and those that are being let go
        assert served.residency.count == 0

    run(scenario())


def test_a_stale_handle_finds_what_took_its_place(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"m{number}.onnx", line(number + 1))

    async def scenario() -> None:
        async with service(tmp_path, max_resident_models=1, direct_us=1e6) as served:
            held = await served.model("m0")
            assert isinstance(held, LiveModel)
            await served.model("m1")  # makes m0 leave, and waits until it is gone although it is held
            assert served.find("m0") is None and served.residency.count == 1
            assert held.infer_now(request(5, 1)) is None
            assert (await held.infer(request(5, 1))).outputs["y"][0, 0] == 5

    run(scenario())


def test_memory_of_what_was_unloaded_is_let_go_at_once(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        async with service(tmp_path, control="explicit", load_models=("a",), drain_s=60.0) as served:
            await asyncio.gather(*(ask(served, "a", request(number, 1)) for number in range(20)))
            with pytest.raises(InputError):
                await (await served.model("a")).infer(InferRequest({}))
            start = time.monotonic()
            await served.unload("a")
            assert time.monotonic() - start < 10 and served.residency.count == 0

    run(scenario())


def test_deadlines_and_full_queues_through_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.onnx", line(2))
    (tmp_path / "a.accelrt.json").write_text('{"max_queue": 4, "max_batch_size": 1, "workers": 1}')
    from accelrt.runtime.session import Session

    gate, computed = threading.Event(), []
    real = Session.predict

    def predict(self: Session, *inputs: Any) -> Any:
        if inputs[0]["x"][0, 0] != 0:  # not those that warm up
            gate.wait(20)
            computed.append(float(inputs[0]["x"][0, 0]))
        return real(self, *inputs)

    monkeypatch.setattr(Session, "predict", predict)

    async def scenario() -> None:
        async with service(tmp_path, direct_us=0) as served:
            model = await served.model("a")
            first = asyncio.create_task(model.infer(request(1, 1)))
            await settled(lambda: model.queue.busy == 1 and model.queue.waiting == 0)  # type: ignore[attr-defined]
            late = asyncio.create_task(model.infer(request(2, 1, timeout_us=20_000)))
            gone = asyncio.create_task(model.infer(request(3, 1)))
            others = [asyncio.create_task(model.infer(request(4 + number, 1))) for number in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await model.infer(request(9, 1))
            with pytest.raises(RequestTimeout):
                await late
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            gate.set()
            await asyncio.gather(first, *others)
            assert computed == [1, 4, 5]
            read = served.statistics("a", "1")[0]
            assert (read.rejected, read.timed_out, read.success.count, read.pending) == (1, 1, 3, 0)
            with pytest.raises(ModelNotFound):
                served.statistics("b")

    run(scenario())


def test_text_arrives_as_bytes_and_leaves_as_text(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.STRING, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "text", [x], [y])
    put(
        tmp_path / "a.onnx",
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9),
    )

    async def scenario() -> None:
        async with service(tmp_path, defaults=ModelSettings(max_batch_size=4)) as served:
            asked = InferRequest({"x": np.array(["grüß".encode(), b"b"], object)})
            assert (await ask(served, "a", asked)).outputs["y"].tolist() == ["grüß", "b"]
            model = await served.model("a")
            assert (
                model.metadata.inputs[0].datatype == "BYTES" and model.config["input"][0]["data_type"] == "TYPE_STRING"
            )

    run(scenario())


def test_two_hundred_models_with_room_for_twenty(tmp_path: Path) -> None:
    """The short form of ``benchmarks/serve_many.py``."""
    for number in range(200):
        put(tmp_path / f"m{number}.onnx", line(number + 1))

    async def scenario() -> None:
        generator = np.random.default_rng(1)
        async with service(tmp_path, max_resident_models=20) as served:

            async def client() -> None:
                for _ in range(30):
                    # Some models are asked for much more often than others.
                    number = min(int(generator.pareto(1.0) * 5), 199)
                    answer = await ask(served, f"m{number}", request(3, 1))
                    assert answer.outputs["y"].tolist() == [[3 * (number + 1), number + 1]]

            await asyncio.gather(*(client() for _ in range(8)))
            assert served.residency.count <= 20 and served.ready()

    run(scenario(), 300)


def test_while_models_are_loaded_waiting_for_the_lock_does_not_close_the_short_way() -> None:
    loads = Loads()
    gate = DirectGate(200, loads)
    gate.open_after(8, 50_000)
    with loads:
        for _ in range(50):
            gate.slow(8, 4_000_000)
        assert gate.score == 0
        gate.slow(8, 6_000_000)  # longer than a handful of turns of the lock
        assert gate.score == 20
    gate.slow(8, 4_000_000)
    assert gate.score == 40 and loads.under_way == 0


def test_loads_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    put(tmp_path / "b.onnx", line(3))

    async def scenario() -> None:
        async with service(tmp_path, max_resident_models=1) as served:
            for name in ("a", "b", "a"):
                await ask(served, name, request(1, 2))
            counts = {row.name: row.loads for row in served.snapshot()}
            assert sum(counts.values()) in (3, 4)  # one of the two was there from the start
            assert counts["a"] == 2

    run(scenario())


def test_who_asks_while_the_server_starts_is_told_to_come_back(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        served = service(tmp_path)
        with pytest.raises(ModelUnavailable, match="is starting") as refused:
            await served.model("a")
        assert refused.value.retry_after_s
        async with served:
            await served.model("a")
            with pytest.raises(ModelNotFound):
                await served.model("b")

    run(scenario())


def test_an_upload_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    uploads = Uploads(1 << 30)
    kept = uploads.keep({"file:1/model.onnx": b"a" * 1000})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ModelUnavailable, match="cannot be kept: File too large") as refused:
            uploads.keep({"file:1/small": b"b" * 100, "file:1/model.onnx": b"c" * 8192})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert refused.value.retry_after_s
    assert {path.read_bytes()[:1] for path in tmp_path.rglob("*") if path.is_file()} == {b"a"}
    again = uploads.keep({"file:1/model.onnx": b"c" * 8192})
    assert (again.folder / "1" / "model.onnx").stat().st_size == 8192 and kept.folder.exists()
    uploads.close()
