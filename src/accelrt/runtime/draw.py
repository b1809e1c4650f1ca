"""Random inputs of a signature, seeded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from accelrt.errors import InputError
from accelrt.graph.types import OptionalType, Port, SequenceType, Signature, TensorType, Value, ValueType, numpy_dtype


def random_inputs(signature: Signature, sizes: Mapping[str, int], seed: int) -> dict[str, Value]:
    """Draw a value for every input.

    Floats are standard normal, integers 0 or 1 (so that they can be indices of anything), booleans either; a sequence
    has two elements; a dimension is what ``sizes`` says, else 1.

    Raises:
        InputError: ``sizes`` names a dimension that no input has, or the rank of an input is unknown.
    """
    known = symbolic_dimensions(signature)
    if unknown := sorted(set(sizes) - known):
        raise InputError(f"No input has a dimension {unknown[0]!r}; there are {', '.join(sorted(known)) or 'none'}.")
    generator = np.random.default_rng(seed)
    return {port.name: _draw(port.type, port, sizes, generator) for port in signature.inputs}


def symbolic_dimensions(signature: Signature) -> set[str]:
    """Return the names of dimensions of the inputs."""
    names: set[str] = set()
    for port in signature.inputs:
        type_ = port.type
        while not isinstance(type_, TensorType):
            type_ = type_.element
        names.update(dim for dim in type_.shape or () if isinstance(dim, str))
    return names


def _draw(type_: ValueType, port: Port, sizes: Mapping[str, int], generator: np.random.Generator) -> Value:
    if isinstance(type_, SequenceType):
        return [_draw(type_.element, port, sizes, generator) for _ in range(2)]
    if isinstance(type_, OptionalType):
        return _draw(type_.element, port, sizes, generator)
    if type_.shape is None:
        raise InputError(
            f"Input {port.name!r} is of any rank: nothing random can be drawn.", hint="Give inputs of your own."
        )
    shape = tuple(dim if isinstance(dim, int) else sizes.get(dim or "", 1) for dim in type_.shape)
    if type_.dtype == "string":
        return np.full(shape, "text", object)
    dtype = numpy_dtype(type_.dtype)
    if dtype.kind == "c":
        return (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)).astype(dtype)
    if dtype.kind in "biu" or type_.dtype in ("int4", "uint4", "int2", "uint2"):
        return generator.integers(0, 2, shape).astype(dtype)
    return np.asarray(generator.standard_normal(shape)).astype(dtype)
