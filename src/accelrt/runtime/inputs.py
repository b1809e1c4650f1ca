"""Check and bind the inputs of `predict`: never a wrong answer from a mistyped input."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from accelrt.backend import HOST, DeviceTensor, copy_to_host
from accelrt.errors import ExecutionError, InputError
from accelrt.graph.types import (
    OptionalType,
    Port,
    SequenceType,
    Signature,
    TensorType,
    Value,
    ValueType,
    numpy_dtype,
)
from accelrt.runtime.dlpack import layout_of
from accelrt.runtime.residency import HOST_KINDS, DeviceFeeds, OnDevice, Place

Landings: TypeAlias = Mapping[str, Mapping[tuple[int, int], Place]]
"""The devices on which an input may lie, by its name and DLPack's device."""


class Binder:
    """Turns what a caller gave into checked arrays by name. Arrays that fit are passed on without a copy.

    Args:
        signature: That of the model.
        landings: Where tensors are passed on without a copy on devices, too; tensors on others are copied to the host.
    """

    def __init__(self, signature: Signature, landings: Landings = MappingProxyType({})) -> None:
        self._signature = signature
        self._landings = landings
        self._names = signature.input_names
        self._count = len(signature.inputs)
        tensors = [(port.name, port.type) for port in signature.inputs if isinstance(port.type, TensorType)]
        # Only plain tensors of known rank have a fast way; an empty tuple here sends all calls the slow way. Text has
        # none either: an array of objects may hold anything.
        fast = len(tensors) == self._count and all(
            type_.shape is not None and type_.dtype != "string" for _, type_ in tensors
        )
        self._fast: tuple[tuple[str, Any, int, tuple[int, ...] | None, tuple[tuple[int, int], ...]], ...] = ()
        if fast:
            self._fast = tuple((name, *_expectation(type_)) for name, type_ in tensors)

    def bind(self, given: tuple[Any, ...]) -> Mapping[str, Value]:
        """Bind the arguments of a call: one mapping by name, or values in the order of the signature.

        Raises:
            InputError: A name, type or shape does not fit; says which input, what is expected and what came.
        """
        if len(given) == 1 and isinstance(given[0], Mapping):
            named: Mapping[str, Any] = given[0]
        elif len(given) == self._count:
            named = dict(zip(self._names, given, strict=True))
        else:
            raise InputError(
                f"The model takes {self._count} inputs ({', '.join(self._names)}), {len(given)} were given.",
                hint="Pass them in this order, or one mapping by name.",
            )
        if self._fast and len(named) == self._count and type(named) is dict:
            for name, dtype, rank, exact, fixed in self._fast:
                value = named.get(name)
                if type(value) is not np.ndarray or value.dtype is not dtype or not value.flags.c_contiguous:
                    break
                shape = value.shape
                if exact is None:
                    if len(shape) != rank:
                        break
                    for axis, size in fixed:
                        if shape[axis] != size:
                            break
                    else:
                        continue
                    break
                if shape != exact:
                    break
            else:
                return named
        return self._bind_slowly(named)

    def _bind_slowly(self, named: Mapping[str, Any]) -> dict[str, Value]:
        known = set(self._names)
        missing = [
            p.name for p in self._signature.inputs if p.name not in named and not isinstance(p.type, OptionalType)
        ]
        unknown = [name for name in named if name not in known]
        if missing or unknown:
            problems = [f"missing: {', '.join(missing)}"] * bool(missing)
            problems += [f"unknown: {', '.join(map(repr, unknown))}"] * bool(unknown)
            raise InputError(f"Inputs do not fit ({'; '.join(problems)}). The model takes {self._signature}.")
        bound: dict[str, Any] = {}
        for port in self._signature.inputs:
            value: Any = named.get(port.name)
            where = device_of(value)
            bound[port.name] = coerce(value, port) if where is None else self._land(value, where, port)
        waiting: dict[Place, list[OnDevice]] = {}
        for name, value in bound.items():
            if isinstance(value, OnDevice):
                waiting.setdefault(self._landings[name][device_of(value.tensor) or HOST], []).append(value)
        for place, values in waiting.items():
            try:
                place.settle([value.tensor for value in values])
            except Exception as error:
                raise InputError(f"The inputs on {place.device} cannot be waited for: {error}") from error
        return DeviceFeeds(bound) if waiting else bound

    def _land(self, tensor: DeviceTensor, where: tuple[int, int], port: Port) -> Value | OnDevice:
        """Bind a tensor that lies on a device, there if it may stay, else a copy on the host."""
        place = self._landings.get(port.name, {}).get(where)
        if place is None or not isinstance(port.type, TensorType):
            return coerce(tensor, port)
        try:
            layout = layout_of(tensor)
        except Exception as error:
            raise _misfit(port, f"a {type(tensor).__name__} on a device that is not given away: {error}") from error
        if layout.dtype != port.type.dtype:
            found = f"an array of dtype {layout.dtype} on {place.device}"
            raise _misfit(port, found, f"Convert it to {port.type.dtype} there.")
        _check_shape(layout.shape, port.type, port)
        if not layout.contiguous:
            return coerce(tensor, port)

        def read() -> np.ndarray[Any, Any]:
            try:
                return _contiguous(copy_to_host(tensor))
            except Exception as error:
                raise ExecutionError(
                    f"Input {port.name!r} cannot be read from {place.device}, where it was given: {error}",
                    hint="Give it as an array on the host.",
                ) from error

        return OnDevice(tensor, place.device, read)


def device_of(value: Any) -> tuple[int, int] | None:
    """Return the device that a tensor lies on, by DLPack's count; None for all that the host can read."""
    if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "__dlpack_device__"):
        return None
    try:
        kind, index = value.__dlpack_device__()
    except Exception:  # noqa: BLE001 - a tensor that tells no device is read as any other value
        return None
    return None if int(kind) in HOST_KINDS else (int(kind), int(index))


def fetched(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return inputs with those copied to the host that lie on a device, for what cuts and joins rows.

    Raises:
        InputError: One gives no copy of itself.
    """
    if all(device_of(value) is None for value in feeds.values()):
        return feeds
    return {name: value if device_of(value) is None else _fetch(value, name) for name, value in feeds.items()}


def bind_examples(signature: Signature, examples: Any, *, strict: bool) -> Mapping[str, Value] | None:
    """Bind example inputs: a mapping by name, or a list or tuple in order; None for none.

    Those of a framework's model may be nested, or hold what became constants of the graph; where they do not fit and
    that is no mistake (``strict`` is false), they are None as well.

    Raises:
        InputError: ``strict``, and they do not fit.
    """
    if examples is None:
        return None
    positional = isinstance(examples, list | tuple)
    try:
        return Binder(signature).bind(tuple(examples) if positional else (examples,))
    except InputError:
        if strict:
            raise
        return None


def bind_calls(signature: Signature, calls: Any) -> list[Mapping[str, Value]]:
    """Bind the inputs of several calls: each a mapping by name, a tuple in order, or the value of a single input.

    Raises:
        InputError: One does not fit; says which.
    """
    binder, bound = Binder(signature), []
    for number, call in enumerate(calls):
        try:
            bound.append(binder.bind(call if isinstance(call, tuple) else (call,)))
        except InputError as error:
            raise InputError(f"Item {number}: {error.message}", hint=error.hint) from error
    return bound


def _expectation(type_: TensorType) -> tuple[Any, int, tuple[int, ...] | None, tuple[tuple[int, int], ...]]:
    """Return dtype, rank, the whole shape if it is static, and the axes of static size."""
    shape = type_.shape or ()
    fixed = tuple((axis, size) for axis, size in enumerate(shape) if isinstance(size, int))
    exact = tuple(size for _, size in fixed) if len(fixed) == len(shape) else None
    return numpy_dtype(type_.dtype), len(shape), exact, fixed


def coerce(value: Any, port: Port) -> Value:
    """Return a value as its port's type wants it: C-ordered arrays, lists for sequences, None for empty optionals.

    Arrays keep their dtype or are refused; Python numbers and lists, which have none, take the port's.

    Raises:
        InputError: The value does not fit.
    """
    return _coerce(value, port.type, port)


def _coerce(value: Any, type_: ValueType, port: Port) -> Value:
    match type_:
        case OptionalType(element):
            return None if value is None else _coerce(value, element, port)
        case SequenceType(element):
            if not isinstance(value, list | tuple):
                raise _misfit(port, f"a {type(value).__name__}, not a list")
            return [_coerce(item, element, port) for item in value]
        case TensorType():
            array = _array(value, type_, port)
            _check_shape(array.shape, type_, port)
            return array


def _array(value: Any, type_: TensorType, port: Port) -> np.ndarray[Any, Any]:
    dtype = numpy_dtype(type_.dtype)
    if value is None:
        raise _misfit(port, "None")
    if isinstance(value, bool | numbers.Number | str | list | tuple) and not isinstance(value, np.generic):
        return _from_python(value, type_, dtype, port)
    array = _from_foreign(value, port)
    if type_.dtype == "string":
        return _text(array, port)
    if array.dtype != dtype:
        if array.dtype.newbyteorder("=") != dtype:
            raise _misfit(
                port, f"{_type_name(array)} of dtype {array.dtype}", f"Convert it: x.astype({type_.dtype!r})."
            )
        array = array.astype(dtype)
    return _contiguous(array)


def _contiguous(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # `ascontiguousarray` would make a vector of a scalar.
    return array if array.flags.c_contiguous else array.copy(order="C")


def _from_foreign(value: Any, port: Port) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if device_of(value) is not None:
        return _fetch(value, port.name)
    try:
        if hasattr(value, "__array__"):
            return np.asarray(value)
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
    except Exception as error:
        raise _misfit(port, f"a {type(value).__name__} that gives no array: {error}") from error
    raise _misfit(port, f"a {type(value).__name__}", "Anything with __array__ or __dlpack__ will do.")


def _fetch(tensor: DeviceTensor, name: str) -> np.ndarray[Any, Any]:
    try:
        return copy_to_host(tensor)
    except Exception as error:
        raise InputError(
            f"Input {name!r} is a {type(tensor).__name__} on device {device_of(tensor)} of DLPack, which gives no copy "
            f"of itself: {type(error).__name__}: {error}",
            hint="Copy it to the host first: tensor.cpu() of PyTorch, cupy.asnumpy(array).",
        ) from error


def _from_python(value: Any, type_: TensorType, dtype: np.dtype[Any], port: Port) -> np.ndarray[Any, Any]:
    try:
        # As objects, text keeps numbers among it from becoming text as well.
        array = np.array(value, object if type_.dtype == "string" else None)
    except ValueError as error:
        raise _misfit(port, f"a ragged list: {error}") from error
    if type_.dtype == "string":
        return _text(array, port)
    if array.dtype == object or array.dtype.kind in "US":
        raise _misfit(port, f"a {type(value).__name__} that holds other things than numbers")
    if array.size and not _takes(dtype, array):
        raise _misfit(port, f"Python values of kind {array.dtype.name}, which {type_.dtype} cannot hold exactly")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if _integer_limits(dtype) is None and not np.array_equal(np.isfinite(converted), np.isfinite(array)):
        raise _misfit(port, f"Python values up to {np.abs(array).max():g}, too large for {type_.dtype}")
    return converted


def _takes(dtype: np.dtype[Any], array: np.ndarray[Any, Any]) -> bool:
    """Whether numbers without a dtype may become ``dtype``: floats take numbers, integers whole ones in range."""
    kind = array.dtype.kind
    if dtype.kind == "b" or kind == "b":
        return bool(dtype.kind == kind)
    if (limits := _integer_limits(dtype)) is not None:
        return kind in "iu" and bool(limits[0] <= array.min() and array.max() <= limits[1])
    if dtype.kind == "c":
        return True
    return kind in "iuf"  # floating types, ml_dtypes' among them


def _integer_limits(dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Return the least and the greatest number of an integer type, None for other types."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if dtype.name in ("int2", "int4", "uint2", "uint4"):  # of ml_dtypes, which numpy takes for no kind of number
        bits = int(dtype.name[-1])
        return (0, 2**bits - 1) if dtype.name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return None


def _text(array: np.ndarray[Any, Any], port: Port) -> np.ndarray[Any, Any]:
    texts = array.astype(object)
    try:
        for index, item in enumerate(texts.flat):
            if isinstance(item, bytes):
                texts.flat[index] = item.decode()
            elif not isinstance(item, str):
                raise _misfit(port, f"an array of {array.dtype} that holds {item!r}, which is no text")
    except UnicodeDecodeError as error:
        raise _misfit(port, f"bytes that are no UTF-8: {error}") from error
    return texts


def _check_shape(found: tuple[int, ...], type_: TensorType, port: Port) -> None:
    shape = type_.shape
    if shape is None:
        return
    fits = len(found) == len(shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(shape, found, strict=True)
    )
    if not fits:
        raise _misfit(port, f"shape {list(found)}")


def _type_name(array: np.ndarray[Any, Any]) -> str:
    return "an array" if array.ndim else "a scalar"


def _misfit(port: Port, found: str, hint: str | None = None) -> InputError:
    return InputError(f"Input {port.name!r} takes {port.type}; found {found}.", hint=hint)
