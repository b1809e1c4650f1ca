"""Whole networks on the emulated chips, against float32 on the CPU. Some seconds each, so marked `suite`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest

import accelrt
from accelrt.graph.types import Signature, TensorType
from accelrt.registry import REGISTRY
from accelrt.testing.models import bert_base, densenet121, resnet50
from accelrt_neuron import NeuronBackend

pytestmark = pytest.mark.suite

TARGET = "neuron/emulator"
LIMIT = 2e-2
"""Of the relative L2 error; bf16 keeps eight bits, 4e-3, and the errors of some hundred operators add up."""

MODELS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "resnet50": lambda: resnet50(batch=1),
    "densenet121": lambda: densenet121(batch=1),
    "bert_base": lambda: bert_base(batch=1, sequence=64),
}
VOCABULARY = 30522


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    installed = "neuron" in REGISTRY.names()
    if not installed:
        accelrt.register(NeuronBackend)
    yield
    if not installed:
        REGISTRY.unregister("neuron")


def inputs_for(signature: Signature) -> dict[str, Any]:
    """Draw inputs: pixels as floats; tokens, types and an attention mask as integers."""
    random = np.random.default_rng(0)
    feeds = {}
    for port in signature.inputs:
        assert isinstance(port.type, TensorType)
        assert port.type.shape is not None
        shape = [int(dim) for dim in port.type.shape if isinstance(dim, int)]
        if port.type.dtype == "float32":
            feeds[port.name] = random.standard_normal(shape).astype(np.float32)
        else:
            highest = VOCABULARY if port.name == "input_ids" else 2
            feeds[port.name] = random.integers(0, highest, shape).astype(port.type.dtype)
    return feeds


@pytest.mark.parametrize("instance", ["inf1.xlarge", "inf2.xlarge", "trn2.48xlarge"])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_right_within_bfloat16(
    name: str, instance: str, record_property: Callable[[str, object], None]
) -> None:
    model = MODELS[name]()
    artifact = accelrt.compile(model, TARGET, options={"instance": instance}, fallback="allow", cache=False)
    with accelrt.load(artifact, fallback="error") as session, accelrt.load(model, backend="cpu") as exact:
        feeds = inputs_for(exact.signature)
        found, wanted = session.predict(feeds), exact.predict(feeds)
    errors = {key: float(np.linalg.norm(found[key] - wanted[key]) / np.linalg.norm(wanted[key])) for key in wanted}
    nodes = artifact.placement.nodes_by_engine
    record_property("summary", f"{name} on {instance}: relative error {errors}; nodes {nodes}")
    assert all(1e-5 < error < LIMIT for error in errors.values()), "too far off, or not rounded at all"
    assert nodes[TARGET] > 0.95 * sum(nodes.values())
    on_cpu = {n.kind for s in artifact.placement.segments if s.engine != TARGET for n in s.nodes}
    embeds_on_cpu = "Gather-13" in on_cpu
    assert embeds_on_cpu == (name == "bert_base" and instance.startswith("inf1"))
    if embeds_on_cpu:
        reasons = {refusal.reason for refusal in artifact.placement.refusals if refusal.kind == "Gather-13"}
        assert all("aten::embedding" in reason for reason in reasons)
