"""The backend ``numpy``: a complete third-party backend for accelrt, small enough to read in one go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np

from accelrt.backend import (
    SUPPORTED,
    Backend,
    Caps,
    CompileJob,
    Device,
    Engine,
    Executable,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.errors import CompileError, IncompatibleProgram
from accelrt.graph.node import Node
from accelrt.graph.types import Value
from accelrt_example_plugin.operators import OPERATORS, Array, Step, compute, refusal, to_step

__all__ = ["NumpyBackend", "NumpyEngine"]

_PLAN, _WEIGHTS = "plan.json", "weights.npz"
_FORMAT = "1"
"""Raised when `_PLAN` changes: part of the fingerprint, so that older programs are compiled again."""


class NumpyBackend(Backend):
    """One device, which is the CPU under numpy."""

    name: ClassVar[str] = "numpy"

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (NumpyEngine(),)

    def devices(self) -> Sequence[Device]:
        return (Device(self.name, 0, f"numpy {np.__version__} on {os.cpu_count()} cores"),)


class NumpyEngine(Engine):
    """Runs each node as a numpy expression."""

    name: ClassVar[str] = "numpy"
    # Every run keeps its values to itself, so calls from several threads do not meet.
    caps: ClassVar[Caps] = Caps(concurrent=True)
    requires: ClassVar[str] = "pip install numpy"

    def status(self) -> Status:
        # An engine of a vendor's would import the SDK here, and turn whatever it raises into a reason and a remedy.
        return Status(True, version=np.__version__)

    def fingerprint(self) -> Mapping[str, str]:
        return {"plan": _FORMAT}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        if precision != "fp32":
            return Verdict.refuse(f"precision {precision} is not offered by this engine")
        reason = refusal(node)
        return SUPPORTED if reason is None else Verdict.refuse(reason)

    def compile(self, job: CompileJob, out: Path) -> Program:
        from accelrt.graph.load import load_graph

        graph = load_graph(job.model)
        # The partitioner asks before it sends anything; whoever calls an engine directly may not have.
        if reasons := [reason for node in graph.nodes if (reason := refusal(node)) is not None]:
            raise CompileError(f"numpy cannot take the segment: {reasons[0]}.", backend=self.name)
        plan = {"steps": [asdict(to_step(node)) for node in graph.nodes], "outputs": list(job.signature.output_names)}
        (out / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        _write_weights(job.model, out / _WEIGHTS)
        files = {_PLAN: out / _PLAN, _WEIGHTS: out / _WEIGHTS}
        return Program(files, self.fingerprint(), job.signature, job.options)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            plan = json.loads(program.files[_PLAN].read_bytes())
            steps = [Step(**{**step, "inputs": tuple(step["inputs"])}) for step in plan["steps"]]
            if unknown := {step.operator for step in steps} - set(OPERATORS):
                raise ValueError(f"unknown operators {sorted(unknown)}")
            weights = _read_weights(program.files[_WEIGHTS])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise IncompatibleProgram(f"numpy: the program cannot be read: {error}", backend=self.name) from error
        return _Plan(steps, weights, tuple(plan["outputs"]))


class _Plan(Executable):
    def __init__(self, steps: Sequence[Step], weights: Mapping[str, Array], outputs: tuple[str, ...]) -> None:
        self._steps: Sequence[Step] | None = steps
        self._weights = weights
        self._outputs = outputs

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        if self._steps is None:
            raise RuntimeError("the executable was closed")
        values = {**self._weights, **inputs}
        with np.errstate(all="ignore"):  # infinities are results like others
            for step in self._steps:
                values[step.output] = compute(step, values)
        # A reshaped array is a view of the input; outputs must be arrays of their own.
        return {name: np.array(values[name], np.float32, order="C") for name in self._outputs}

    def close(self) -> None:
        self._steps, self._weights = None, {}


def _write_weights(model: Path, path: Path) -> None:
    """Copy the initialisers of an ONNX file, numbered, because their names need not be file names."""
    import onnx
    from onnx import numpy_helper

    tensors = onnx.load(model).graph.initializer
    names = [tensor.name for tensor in tensors]
    arrays = {f"w{index}": numpy_helper.to_array(tensor) for index, tensor in enumerate(tensors)}
    np.savez(path, names=np.array(names, np.str_), **arrays)


def _read_weights(path: Path) -> dict[str, Array]:
    # Data only: what comes out of an artifact must never be unpickled.
    with np.load(path, allow_pickle=False) as stored:
        return {str(name): stored[f"w{index}"] for index, name in enumerate(stored["names"])}
