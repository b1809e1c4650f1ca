"""ResNet-50 and BERT-base on a GPU: every engine in every precision is verified against float32 on the CPU.

Run with ``pytest -m gpu tests/device`` on a machine that has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import accelrt
from accelrt.artifact.artifact import Artifact
from accelrt.backend import DeviceTensor, Engine, Precision
from accelrt.errors import AccelrtError, VerificationError
from accelrt.graph.types import TensorType
from accelrt.registry import REGISTRY, status_of
from accelrt.testing.models import bert_base, resnet50, small_cnn

pytestmark = pytest.mark.gpu

BATCH = 4
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2, "int8": 0.3}
"""Relative L2 error against float32 on the CPU. float32 without TensorFloat-32 rounds sums in another order; bf16 keeps
8 bits and fp16 11 of each intermediate; int8 is calibrated on few random inputs of a random network."""

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet50": lambda: resnet50(batch=BATCH),
    "bert": lambda: bert_base(batch=BATCH, sequence=128),
}


def _draw(signature: Any, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Draw images, or tokens of which a quarter is padding in every second sentence."""
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for port in signature.inputs:
        assert isinstance(port.type, TensorType)
        assert port.type.shape is not None
        shape = tuple(int(size) for size in port.type.shape)  # type: ignore[arg-type]
        if port.type.dtype == "float32":
            found[port.name] = random.standard_normal(shape, dtype=np.float32)
        elif port.name == "attention_mask":
            found[port.name] = np.ones(shape, np.int64)
            found[port.name][::2, 96:] = 0
        else:
            found[port.name] = random.integers(0, 2 if "type" in port.name else 30522, shape)
    return found


def _error(found: Any, truth: Any) -> float:
    return max(
        float(np.linalg.norm(np.asarray(found[name], np.float64) - value) / np.linalg.norm(value))
        for name, value in truth.items()
    )


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("ACCELRT_CACHE_DIR")
    os.environ["ACCELRT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ACCELRT_CACHE_DIR"]
    else:
        os.environ["ACCELRT_CACHE_DIR"] = before


@pytest.fixture(scope="module")
def backend() -> Any:
    if "cuda" not in REGISTRY.names():
        pytest.skip("the backend cuda is not installed")
    found = REGISTRY.backend("cuda")
    if not found.devices():
        pytest.skip("there is no GPU here")
    return found


@pytest.fixture(scope="module")
def engines(backend: Any) -> list[Engine]:
    found = [engine for engine in backend.engines if "onnx" in engine.formats and status_of(engine).usable]
    if not found:
        pytest.skip("no engine of the backend cuda is usable here")
    return found


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    onnx.save(MODELS[request.param](), path)
    return path


@pytest.fixture(scope="module")
def truth(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with accelrt.load(accelrt.compile(source, "cpu/onnxruntime"), fallback="error") as session:
        feeds = _draw(session.signature, 7)
        return feeds, {name: np.asarray(value, np.float64) for name, value in session.predict(feeds).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_engine_is_near_float32_on_the_cpu(
    engines: list[Engine], source: Path, truth: Any, precision: Precision
) -> None:
    feeds, expected = truth
    for engine in engines:
        target = f"cuda/{engine.name}"
        artifact = accelrt.compile(source, target, precision=precision, fallback="allow", verify=feeds)
        elsewhere = artifact.placement.nodes_elsewhere
        nodes = sum(artifact.placement.nodes_by_engine.values())
        assert artifact.placement.fallen_back <= 0.1 * nodes, f"{target} in {precision}: {elsewhere}"
        with accelrt.load(artifact, fallback="error") as session:
            for _ in range(3):
                found = session.predict(feeds)
                assert _error(found, expected) <= TOLERANCE[precision], f"{target} in {precision}"
                for name, value in found.items():
                    assert value.dtype == np.float32, name  # type: ignore[union-attr]
            there = session.predict(feeds, outputs="device")
            assert all(isinstance(value, DeviceTensor) for value in there.values())
            assert session.stats().errors == session.stats().fallbacks == 0
            _bytes_are_as_foretold(artifact, feeds, target)


def _bytes_are_as_foretold(artifact: Artifact, feeds: dict[str, Any], target: str) -> None:
    with accelrt.load(artifact, fallback="error") as session:
        session.predict(feeds)
        (traffic,) = session.stats().traffic
    segments = artifact.placement.segments
    assert (traffic.to_device, traffic.to_host) == (
        sum(segment.from_host or 0 for segment in segments),
        sum(segment.to_host or 0 for segment in segments),
    ), target


def test_int8_is_verified_or_refused(engines: list[Engine]) -> None:
    model = small_cnn(batch=BATCH)
    with accelrt.load(accelrt.compile(model, "cpu/onnxruntime"), fallback="error") as session:
        calibration = [_draw(session.signature, seed) for seed in range(8)]
        feeds = _draw(session.signature, 99)
        expected = {name: np.asarray(value, np.float64) for name, value in session.predict(feeds).items()}
    for engine in engines:
        target = f"cuda/{engine.name}"
        try:
            artifact = accelrt.compile(
                model, target, precision="int8", calibration=calibration, fallback="error", verify=feeds
            )
        except VerificationError:
            raise
        except AccelrtError as refusal:
            assert str(refusal), target
            continue
        assert artifact.verification is not None
        with accelrt.load(artifact, fallback="error") as session:
            assert _error(session.predict(feeds), expected) <= TOLERANCE["int8"], target


@pytest.mark.torch
def test_tensors_of_pytorch_come_and_go_without_a_copy(engines: list[Engine], backend: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch finds no GPU")
    model = small_cnn(batch=BATCH)
    for engine in engines:
        if not engine.caps.device_tensors or backend.dlpack_device(backend.devices()[0]) is None:
            continue
        artifact = accelrt.compile(model, f"cuda/{engine.name}", fallback="allow")
        if len(artifact.placement.segments) != 1:
            continue
        with accelrt.load(artifact, fallback="error") as session:
            feeds = _draw(session.signature, 3)
            expected = session.predict(feeds)
            before = session.stats().host_bytes
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                # Still being computed when it is given: the answer must be that of the finished tensor.
                big, turn = (torch.randn(4096, 4096, device="cuda") for _ in range(2))
                for _ in range(20):
                    big = torch.tanh(big @ turn / 64)
                nothing = 0 * big.sum()
                given = {name: torch.from_numpy(value).cuda() + nothing for name, value in feeds.items()}
                found = session.predict(given, outputs="device")
            assert session.stats().host_bytes == before, engine.name
            for name, tensor in found.items():
                assert tensor.__dlpack_device__()[0] == 2
                array = torch.from_dlpack(tensor).cpu().numpy()
                np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-4, err_msg=engine.name)


def test_a_tensor_on_the_gpu_is_copied_for_a_model_on_the_cpu(backend: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch finds no GPU")
    with accelrt.load(accelrt.compile(small_cnn(batch=BATCH), "cpu/onnxruntime")) as session:
        feeds = _draw(session.signature, 3)
        expected = session.predict(feeds)["scores"]
        np.testing.assert_array_equal(session.predict(torch.from_numpy(feeds["image"]).cuda())["scores"], expected)
