"""Operators that ONNX's reference evaluator lacks or gets wrong, written from the specification.

Found with onnx 1.23.2: `If` and `Optional` cannot carry an empty optional; `Loop` joins scan outputs
along their first axis instead of stacking them, and never starts without a condition; `Scan` knows
neither its first version nor directions, axes and empty inputs; `Scatter` is missing; the softmax family
does not know that its default axis was another, and meant more, before opset 13; `STFT` loops in Python
where numpy can transform all frames at once.

A class is found by its name whatever the opset, so each serves every version of its operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import TypeProto, helper
from onnx.reference.op_run import OpRun

Array: TypeAlias = np.ndarray[Any, Any]


class _Operator(OpRun):  # type: ignore[misc]  # the evaluator has no types
    @property
    def _version(self) -> int:
        return int(self.run_params["opsets"][self.onnx_node.domain])

    def _given(self, name: str) -> bool:
        return any(attribute.name == name for attribute in self.onnx_node.attribute)

    def _check_and_fix_outputs(self, res: tuple[Any, ...]) -> tuple[Any, ...]:
        # The evaluator's own check refuses None, which is what an empty optional is.
        return tuple(np.asarray(value) if np.isscalar(value) else value for value in res)


class _ControlFlow(_Operator):
    def need_context(self) -> bool:
        return True


class If(_ControlFlow):
    """Runs one of two graphs; either may return empty optionals."""

    def _run(
        self, cond: Array, context: Any = None, attributes: Any = None, bindings: Any = None, **_: Any
    ) -> tuple[Any, ...]:
        branch = self._run_then_branch if cond.item() else self._run_else_branch
        return tuple(branch(context, attributes=attributes, bindings=bindings))


class Loop(_ControlFlow):
    """Runs a graph until a count or a condition ends it; both are optional."""

    def _run(
        self,
        count: Array | None,
        condition: Array | None,
        *initial: Any,
        context: Any = None,
        attributes: Any = None,
        bindings: Any = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        body = self.body
        carried = len(body.input_names) - 2
        state: list[Any] = list(initial) + [None] * (carried - len(initial))
        scans: list[list[Array]] = [[] for _ in body.output_names[1 + carried :]]
        scope: dict[str, Any] = dict(context or {})
        going, limit = (
            condition is None or bool(condition.item()),
            None if count is None else int(count.item()),
        )
        iteration = 0
        while going and (limit is None or iteration < limit):
            values = [np.array(iteration, np.int64), np.array(going), *state]
            scope.update(zip(body.input_names, values, strict=True))
            results = self._run_body(scope, attributes=attributes, bindings=bindings)
            going, state = bool(results[0].item()), list(results[1 : 1 + carried])
            for scan, value in zip(scans, results[1 + carried :], strict=True):
                scan.append(value)
            iteration += 1
        types = body.output_types[1 + carried :]
        return (*state, *(_stack(scan, type_, 0) for scan, type_ in zip(scans, types, strict=True)))


class Scan(_ControlFlow):
    """Runs a graph once for each slice of its inputs; version 8 does so for each element of a batch."""

    # The evaluator's own constructor refuses directions and axes; this one has nothing to prepare.
    def _run(
        self,
        *args: Any,
        context: Any = None,
        attributes: Any = None,
        bindings: Any = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        def body(values: Iterable[Any]) -> list[Any]:
            scope = dict(context or {})
            scope.update(zip(self.body.input_names, values, strict=True))
            return list(self._run_body(scope, attributes=attributes, bindings=bindings))

        return self._batched(body, *args) if self._version < 9 else self._once(body, args)

    def _once(self, body: Callable[[Iterable[Any]], list[Any]], args: Sequence[Any]) -> tuple[Any, ...]:
        carried = len(args) - self.num_scan_inputs
        state, inputs = list(args[:carried]), args[carried:]
        outputs = len(self.body.output_names) - carried
        in_axes = self._per("scan_input_axes", len(inputs))
        moved = [np.moveaxis(value, axis, 0) for value, axis in zip(inputs, in_axes, strict=True)]
        reverse = self._per("scan_input_directions", len(inputs))
        state, scans = _iterate(body, state, moved, reverse, outputs, len(moved[0]))
        out_axes, backward = (
            self._per("scan_output_axes", outputs),
            self._per("scan_output_directions", outputs),
        )
        types = self.body.output_types[carried:]
        stacked = (
            _stack(scan[::-1] if back else scan, type_, axis)
            for scan, type_, axis, back in zip(scans, types, out_axes, backward, strict=True)
        )
        return (*state, *stacked)

    def _batched(
        self, body: Callable[[Iterable[Any]], list[Any]], lengths: Array | None, *args: Array
    ) -> tuple[Any, ...]:
        carried = len(args) - self.num_scan_inputs
        outputs = len(self.body.output_names) - carried
        batch, longest = args[carried].shape[:2]
        reverse = self._per("directions", self.num_scan_inputs)
        types = self.body.output_types[carried:]
        rows: list[list[Any]] = []
        for element in range(batch):
            length = longest if lengths is None else int(lengths[element])
            inputs = [value[element, :length] for value in args[carried:]]
            state, scans = _iterate(
                body, [value[element] for value in args[:carried]], inputs, reverse, outputs, length
            )
            stacked = [_stack(scan, type_, 0) for scan, type_ in zip(scans, types, strict=True)]
            # What lies beyond a sequence's length is undefined; zeros are as good as anything.
            padded = [np.concatenate([s, np.zeros((longest - length, *s.shape[1:]), s.dtype)]) for s in stacked]
            rows.append([*state, *padded])
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    def _per(self, attribute: str, count: int) -> list[int]:
        return list(getattr(self, attribute, None) or [0] * count)


def _iterate(
    body: Callable[[Iterable[Any]], list[Any]],
    state: list[Any],
    inputs: Sequence[Array],
    reverse: Sequence[int],
    outputs: int,
    length: int,
) -> tuple[list[Any], list[list[Array]]]:
    carried = len(state)
    scans: list[list[Array]] = [[] for _ in range(outputs)]
    for step in range(length):
        slices = (np.asarray(v[length - 1 - step if back else step]) for v, back in zip(inputs, reverse, strict=True))
        results = body([*state, *slices])
        state = results[:carried]
        for scan, value in zip(scans, results[carried:], strict=True):
            scan.append(value)
    return state, scans


def _stack(values: Sequence[Array], declared: TypeProto, axis: int) -> Array:
    """Stack the values of a scan output; with none, only its declared type tells what is empty."""
    if values:
        return np.stack(values, axis)
    tensor = declared.tensor_type
    if not tensor.elem_type:
        raise RuntimeError("a loop of no iterations has a scan output whose body declares no type")
    shape = [dim.dim_value for dim in tensor.shape.dim]
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 0)
    return np.empty(shape, helper.tensor_dtype_to_np_dtype(tensor.elem_type))


class Optional(_Operator):
    """An optional is its value, or None."""

    def _run(self, value: Any = None, **_: Any) -> tuple[Any, ...]:
        return (value,)


class Identity(_Operator):
    """Returns its input, which may be a sequence or an empty optional."""

    def _run(self, value: Any) -> tuple[Any, ...]:
        return (value.copy() if hasattr(value, "copy") else value,)


class Scatter(_Operator):
    """Writes updates at indices along one axis: `ScatterElements` before it had that name."""

    def _run(self, data: Array, indices: Array, updates: Array, axis: int | None = None, **_: Any) -> tuple[Array]:
        axis = axis or 0
        result = data.copy()
        target: list[Array] = list(np.indices(indices.shape))
        target[axis] = np.where(indices < 0, indices + data.shape[axis], indices)
        result[tuple(target)] = updates
        return (result,)


class _Normalised(_Operator):
    """Since opset 13 these work along one axis; before, on all axes from it on, taken as one."""

    def _run(self, x: Array, axis: int | None = None, **_: Any) -> tuple[Array]:
        flat = self._version < 13
        if axis is None or not self._given("axis"):
            axis = 1 if flat else -1
        if x.size == 0:
            return (x.copy(),)
        if not flat:
            return (self._apply(x, axis),)
        lead = int(np.prod(x.shape[: axis if axis >= 0 else axis + x.ndim], dtype=np.int64))
        return (self._apply(x.reshape(lead, -1), 1).reshape(x.shape),)

    def _apply(self, x: Array, axis: int) -> Array:
        raise NotImplementedError


class Softmax(_Normalised):
    """Exponentials that sum to one."""

    def _apply(self, x: Array, axis: int) -> Array:
        power = np.exp(x - x.max(axis, keepdims=True))
        return np.asarray(power / power.sum(axis, keepdims=True), x.dtype)


class LogSoftmax(_Normalised):
    """Logarithm of `Softmax`, without leaving the range of the type."""

    def _apply(self, x: Array, axis: int) -> Array:
        shifted = x - x.max(axis, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis, keepdims=True)), x.dtype)


class Hardmax(_Normalised):
    """One at the first largest value, zero elsewhere."""

    def _apply(self, x: Array, axis: int) -> Array:
        result = np.zeros_like(x)
        np.put_along_axis(result, np.expand_dims(x.argmax(axis), axis), 1, axis)
        return result


class STFT(_Operator):
    """Fourier transforms of frames that slide over a signal, all at once."""

    def _run(
        self,
        signal: Array,
        step: Array,
        window: Array | None = None,
        length: Array | None = None,
        onesided: int | None = None,
        **_: Any,
    ) -> tuple[Array]:
        default = signal.shape[1] if window is None else len(window)
        size = default if length is None else int(length.item())
        # numpy transforms float32 in float32 and has nothing narrower.
        wide = signal.astype(np.float64 if signal.dtype == np.float64 else np.float32, order="C")
        values: Array = wide[..., 0]
        if wide.shape[-1] == 2:
            values = wide.view(np.result_type(wide.dtype, np.complex64))[..., 0]
        frames = np.lib.stride_tricks.sliding_window_view(values, size, axis=1)[:, :: int(step.item())]
        if window is not None:
            frames = frames * window.astype(wide.dtype)
        if onesided is None or onesided:
            spectrum = np.fft.fft(frames)[..., : size // 2 + 1] if np.iscomplexobj(frames) else np.fft.rfft(frames)
        else:
            spectrum = np.fft.fft(frames)
        return (np.stack([spectrum.real, spectrum.imag], -1).astype(signal.dtype),)


REPLACEMENTS: Mapping[tuple[str, str], type[OpRun]] = {
    ("", operator.__name__): operator
    for operator in (If, Loop, Scan, Optional, Identity, Scatter, Softmax, LogSoftmax, Hardmax, STFT)
}
