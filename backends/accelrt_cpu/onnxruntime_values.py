"""How values get into and out of onnxruntime's sessions: as numpy arrays, as OrtValues where numpy has no type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelrt.backend import Executable
from accelrt.graph.ort_values import Feeder, from_ort, is_plain, needs_bits
from accelrt.graph.types import Signature, TensorType, Value


def executable(ort: Any, session: Any, signature: Signature, *, io_binding: bool) -> Executable:
    """Wrap a session: the short way where numpy can hold every value, through OrtValues where it cannot."""
    types = [port.type for port in (*signature.inputs, *signature.outputs)]
    if io_binding and all(isinstance(type_, TensorType) for type_ in types):
        return _Bound(ort, session, signature)
    if all(map(is_plain, types)):
        return _Plain(session, signature)
    return _Extended(ort, session, signature)


class _Plain(Executable):
    def __init__(self, session: Any, signature: Signature) -> None:
        self._session = session
        self._outputs = list(signature.output_names)
        # The binding below InferenceSession.run: the same call without checks that the session has already made.
        inner = getattr(session, "_sess", None)
        self._run = inner.run if inner is not None else session.run

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        return dict(zip(self._outputs, self._run(self._outputs, inputs, None), strict=True))

    def close(self) -> None:
        self._run = _closed
        self._session = None


class _Bound(Executable):
    """Tensors by IO binding: inputs are not copied, outputs are onnxruntime's own buffers."""

    def __init__(self, ort: Any, session: Any, signature: Signature) -> None:
        self._session, self._signature = session, signature
        self._feeder = Feeder(ort)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        # A binding belongs to one call: several threads may be here at once.
        binding = self._session.io_binding()
        feeds = [(port.name, self._feeder.to_ort(inputs[port.name], port.type)) for port in self._signature.inputs]
        for name, value in feeds:
            binding.bind_ortvalue_input(name, value)
        for port in self._signature.outputs:
            binding.bind_output(port.name)
        self._session.run_with_iobinding(binding)
        outputs = zip(self._signature.outputs, binding.get_outputs(), strict=True)
        return {port.name: from_ort(value, port.type) for port, value in outputs}

    def close(self) -> None:
        self._session = None


class _Extended(Executable):
    """Types that numpy lacks, optionals, and sequences beside them."""

    def __init__(self, ort: Any, session: Any, signature: Signature) -> None:
        self._session, self._signature = session, signature
        self._feeder = Feeder(ort)
        # Outputs that numpy lacks are had as OrtValues only; sequences can then not be inputs (see `unreachable`).
        self._by_value = any(needs_bits(port.type) for port in signature.outputs)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        feeds = {port.name: self._feeder.to_ort(inputs[port.name], port.type) for port in self._signature.inputs}
        feeds = {name: value for name, value in feeds.items() if value is not None}
        names = list(self._signature.output_names)
        if not self._by_value:
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        values = self._session.run_with_ort_values(names, feeds)
        outputs = zip(self._signature.outputs, values, strict=True)
        return {port.name: from_ort(value, port.type) for port, value in outputs}

    def close(self) -> None:
        self._session = None


def _closed(*_: object) -> Any:
    raise RuntimeError("the executable was closed")
