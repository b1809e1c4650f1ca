"""The ONNX backend test interface over any target, so that ONNX's own suite runs through accelrt.

::

    from onnx.backend.test import BackendTest
    globals().update(BackendTest(backend_for("cpu")).test_cases)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx
from onnx.backend.base import Backend, BackendRep

import accelrt
from accelrt.graph.types import OptionalType
from accelrt.runtime.session import Session


class SessionRep(BackendRep):  # type: ignore[misc]
    """A session as ONNX's tests want to call it: a list of inputs in, a list of outputs out."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        """Run with inputs in the order of the model's signature; trailing optional ones may be left out."""
        ports = self.session.signature.inputs
        feeds: dict[str, Any] = {port.name: None for port in ports if isinstance(port.type, OptionalType)}
        feeds.update(zip((port.name for port in ports), inputs, strict=False))
        outputs = self.session.predict(feeds)
        return tuple(outputs[name] for name in self.session.signature.output_names)


class AccelrtBackend(Backend):  # type: ignore[misc]
    """What `backend_for` derives from; ``nodes`` counts the nodes that ran by engine and operator."""

    target: ClassVar[str] = "cpu"
    options: ClassVar[Mapping[str, Any]] = {}
    fallback: ClassVar[str] = "error"
    nodes: ClassVar[Counter[tuple[str, str]]]

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> SessionRep:
        """Compile and load a model; the cache is not used, so that what is tested is this code."""
        artifact = accelrt.compile(model, cls.target, fallback="allow", options=cls.options, cache=False)
        for segment in artifact.placement.segments:
            cls.nodes.update((segment.engine, node.kind) for node in segment.nodes)
        return SessionRep(accelrt.load(artifact, fallback=cls.fallback))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """The suite's device is the CPU: accelrt's target says where things really run."""
        return device == "CPU"


def backend_for(
    target: str, options: Mapping[str, Any] | None = None, *, fallback: str = "error"
) -> type[AccelrtBackend]:
    """Return an ONNX backend class that runs everything through one target.

    ``fallback`` is the policy at load and run: by default a segment must run where its placement says.
    """
    name = "Accelrt" + "".join(part.capitalize() for part in target.replace("/", "-").split("-"))
    return type(
        name, (AccelrtBackend,), {"target": target, "options": options or {}, "fallback": fallback, "nodes": Counter()}
    )
