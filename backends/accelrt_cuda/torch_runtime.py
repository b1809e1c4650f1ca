"""Programs of cuda/torch in this process: opened on a device, and run there."""

from __future__ import annotations

import gc
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelrt.backend import DeviceTensor, Executable, Precision
from accelrt.errors import IncompatibleProgram, InputError, OutOfDeviceMemory
from accelrt.graph import exported
from accelrt.graph.lowering.dtypes import torch_dtype
from accelrt.graph.types import Port, Signature, TensorType, Value, numpy_dtype
from accelrt_cuda.torch_lanes import Key, Lane, Lanes, Work
from accelrt_cuda.torch_place import Place
from accelrt_cuda.torch_prepare import HALVES, prepare
from accelrt_cuda.torch_settings import PACKAGE_FACTS, TorchCudaOptions, inductor_settings, lays_channels_last
from accelrt_cuda.torch_transfer import Lent, carried

logger = logging.getLogger("accelrt")

_SCRIPT_WARM_UPS = 4
"""TorchScript looks at its first runs before it compiles what it saw, twice by default."""


class TorchExecutable(Executable):
    """A program on a device.

    Args:
        place: The device.
        work: The program.
        signature: Its inputs and outputs.
        options: The engine's.
        check: Raises `InputError` for values that must not reach the device.
    """

    def __init__(
        self,
        place: Place,
        work: Work,
        signature: Signature,
        options: TorchCudaOptions,
        check: Callable[[Mapping[str, Value]], None],
    ) -> None:
        self._place, self._work, self._check = place, work, check
        self._signature = signature
        self._names, self._outputs = signature.input_names, signature.output_names
        lent = Lent()
        self._lanes: Lanes | None = None
        lanes = [Lane(place, work, options.graphs, lent)]
        if (shapes := _static_shapes(signature)) is not None:
            lanes[0].warm(shapes)
        for _ in range(1, options.streams):
            lane = Lane(place, work, options.graphs, lent)
            try:
                if shapes is not None:
                    lane.warm(shapes)
            except RuntimeError as error:
                lane.close()
                lane.give_back()
                if not isinstance(place.translated(error, work.bytes), OutOfDeviceMemory):
                    raise
                logger.warning("cuda/torch runs with %d streams: there is no memory for another.", len(lanes))
                break
            lanes.append(lane)
        self._lanes = Lanes(lanes)

    @property
    def recordings(self) -> int:
        """Recordings at hand, in all lanes."""
        return 0 if self._lanes is None else sum(lane.recorded for lane in self._lanes.all)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        lanes = self._open()
        self._check(inputs)
        try:
            with lanes.one() as lane:
                results = lane.run([inputs[name] for name in self._names])
        except RuntimeError as error:
            raise self._place.translated(error, self._work.bytes) from error
        return dict(zip(self._outputs, results, strict=True))

    def run_resident(self, inputs: Mapping[str, Value | DeviceTensor], keep: Collection[str]) -> dict[str, Any]:
        lanes = self._open()
        kept = {index for index, name in enumerate(self._outputs) if name in keep}
        try:
            with lanes.one() as lane:
                results = lane.run_resident([inputs[name] for name in self._names], kept, self._check_resident)
        except RuntimeError as error:
            raise self._place.translated(error, self._work.bytes) from error
        return dict(zip(self._outputs, results, strict=True))

    def to_host(self, tensor: DeviceTensor) -> np.ndarray[Any, Any]:
        assert isinstance(tensor, torch.Tensor)  # the contract: one that `run_resident` returned
        try:
            # A copy even where the device is the host itself: the caller may write to it.
            array: np.ndarray[Any, Any] = carried(tensor.detach().to("cpu", copy=True)).numpy()
            return array.view(numpy_dtype("bfloat16")) if tensor.dtype == torch.bfloat16 else array
        except RuntimeError as error:
            raise self._place.translated(error, 0) from error

    def _check_resident(self, values: Sequence[Any]) -> None:
        """Hold values against the signature, as the session does with inputs of its own, and check as `run` does."""
        for port, value in zip(self._signature.inputs, values, strict=True):
            declared = port.type.shape if isinstance(port.type, TensorType) else None
            shape = tuple(value.shape)
            if declared is not None and (
                len(declared) != len(shape)
                or any(isinstance(d, int) and d != s for d, s in zip(declared, shape, strict=True))
            ):
                raise InputError(f"The input {port.name!r} has the shape {shape}, and the program takes {port.type}.")
        self._check(dict(zip(self._names, values, strict=True)))

    def close(self) -> None:
        lanes, self._lanes = self._lanes, None
        if lanes is None:
            return
        for lane in lanes.all:
            lane.close()
            lane.give_back()
        # Modules of torch refer to themselves in circles; the memory of their weights is to be free now.
        self._work = replace(self._work, call=_closed, held=frozenset())
        del lanes, lane
        gc.collect()
        self._place.trim()

    def _open(self) -> Lanes:
        if self._lanes is None:
            raise RuntimeError("the executable was closed")
        return self._lanes

    def _tensor(self, name: str, value: Any, dtype: Any) -> Any:
        """Return a tensor of torch's for one of any library's, in the same memory where that is on this device."""
        tensor = value if isinstance(value, torch.Tensor) else torch.from_dlpack(value)
        if tensor.dtype != dtype:
            raise InputError(f"The input {name!r} is a tensor of {tensor.dtype} on the device, and {dtype} is needed.")
        return tensor if tensor.device == self._place.device else tensor.to(self._place.device)


def _closed(tensors: list[Any]) -> list[Any]:
    raise RuntimeError("the executable was closed")


def _static_shapes(signature: Signature) -> Key | None:
    """Return the shapes of the inputs if each is known."""
    shapes = []
    for port in signature.inputs:
        shape = port.type.shape if isinstance(port.type, TensorType) else None
        if shape is None or not all(isinstance(size, int) for size in shape):
            return None
        shapes.append(tuple(int(size) for size in shape))  # type: ignore[arg-type]
    return tuple(shapes)


# What is opened


def open_segment(
    path: Path, signature: Signature, precision: Precision, options: TorchCudaOptions, mode: str, place: Place
) -> Executable:
    """Make a segment of ONNX resident.

    Args:
        path: The segment.
        signature: Its inputs and outputs.
        precision: fp32, bf16 or fp16.
        options: The engine's.
        mode: ``eager``, ``graph`` or ``compile``.
        place: Where.

    Raises:
        CompileError: It cannot be lowered.
        IncompatibleProgram: ``graph`` was asked for by name, and it cannot be recorded.
    """
    last = lays_channels_last(precision, options)
    prepared = prepare(path, precision, place.device, channels_last=last)
    module = prepared.module
    if options.mode == "graph" and prepared.depends:
        raise IncompatibleProgram(
            f"Its launches depend on values and cannot be recorded: {'; '.join(prepared.depends)}.",
            hint="Take mode='eager', or 'auto'.",
            backend="torch",
        )
    finish = _Finish(signature, place.device)
    held = list(module.buffers())

    def build(run: Callable[..., Any]) -> Executable:
        work = Work(
            lambda tensors: finish(run(*tensors)),
            _input_types(signature),
            _output_types(signature),
            _storages(held),
            allow_tf32=options.allow_tf32,
            recordable=mode != "eager" and not prepared.depends,
            bytes=_bytes(held),
        )
        return _executable(place, work, signature, options, Bounds(prepared.bounds))

    if mode != "compile":
        return build(module)
    return _compiled(build, module, signature, options, place, channels_last=last)


def _compiled(
    build: Callable[[Callable[..., Any]], Executable],
    module: Any,
    signature: Signature,
    options: TorchCudaOptions,
    place: Place,
    *,
    channels_last: bool,
) -> Executable:
    """Compile by inductor; where that was not asked for by name and fails, run torch's own kernels, and say so."""
    settings = inductor_settings(options, channels_last=channels_last)
    try:
        return build(torch.compile(module, dynamic=_static_shapes(signature) is None, options=settings))
    except Exception as error:
        if options.mode == "compile" or place.translated(error, 0) is not error:
            raise
        logger.warning(
            "cuda/torch runs a program with torch's own kernels, because inductor failed: %s",
            " ".join(f"{type(error).__name__}: {error}".split())[:300],
        )
    return build(module)


def open_package(
    path: Path, facts: Mapping[str, Any], signature: Signature, options: TorchCudaOptions, place: Place
) -> Executable:
    """Make a package of AOTInductor resident.

    Args:
        path: The package.
        facts: What `accelrt_cuda.torch_child.package` returned. Compiled code checks nothing, and reads past the end of
            what is too small.
        signature: Of the model.
        options: The engine's.
        place: Where.
    """
    index = -1 if place.device.index is None else place.device.index
    # Its own bookkeeping for several threads asks the device for news, which a recording forbids.
    loader = torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=index).loader
    turn = threading.Lock()
    finish = _Finish(signature, place.device)

    def call(tensors: list[Any]) -> list[Any]:
        with turn:
            results: Iterable[Any] = loader.boxed_run(list(tensors))
        return finish(results)

    work = Work(
        call,
        _input_types(signature),
        _output_types(signature),
        allow_tf32=options.allow_tf32,
        bytes=path.stat().st_size,
    )
    sizes, bounds = exported.Sizes(signature, facts), Bounds(facts["bounds"])

    def check(inputs: Mapping[str, Value]) -> None:
        if (problem := sizes.problem(inputs)) is not None:
            raise InputError(f"The inputs do not fit together: {problem}.")
        bounds(inputs)

    return _executable(place, work, signature, options, check)


def open_program(
    path: Path, signature: Signature, precision: Precision, options: TorchCudaOptions, mode: str, place: Place
) -> Executable:
    """Make a whole exported program resident; arguments as of `open_segment`."""
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(path)
    stateful = exported.writes(program)
    arguments, results = exported.arguments(program), exported.results(program)
    in_spec = program.call_spec.in_spec
    module = move_to_device_pass(program, str(place.device)).module()
    held = [*program.state_dict.values(), *program.constants.values()]
    finish = _Finish(signature, place.device)

    def build(run: Callable[..., Any]) -> Executable:
        def call(tensors: list[Any]) -> list[Any]:
            given = iter(tensors)
            flat = [next(given) if is_input else value for is_input, value in arguments]
            args, kwargs = torch.utils._pytree.tree_unflatten(flat, in_spec)
            with _autocast(place, precision):
                returned = torch.utils._pytree.tree_leaves(run(*args, **kwargs))
            return finish([leaf for leaf, kept in zip(returned, results, strict=True) if kept])

        work = Work(
            call,
            _input_types(signature),
            _output_types(signature),
            _storages(held),
            writes=stateful,
            allow_tf32=options.allow_tf32,
            recordable=mode != "eager" and not stateful,
            bytes=_bytes(held),
        )
        return _executable(place, work, signature, options, _no_check)

    if mode != "compile":
        return build(module)
    last = lays_channels_last(precision, options)
    return _compiled(build, module, signature, options, place, channels_last=last)


def open_script(
    path: Path, signature: Signature, precision: Precision, options: TorchCudaOptions, mode: str, place: Place
) -> Executable:
    """Make TorchScript resident; arguments as of `open_segment`."""
    script = torch.jit.load(str(path), map_location=place.device).eval()
    held = [*script.parameters(), *script.buffers()]
    finish = _Finish(signature, place.device)

    def call(tensors: list[Any]) -> list[Any]:
        with _autocast(place, precision):
            returned = torch.utils._pytree.tree_leaves(script(*tensors))
        return finish([leaf for leaf in returned if leaf is not None])

    work = Work(
        call,
        _input_types(signature),
        _output_types(signature),
        _storages(held),
        writes=True,  # it may have been written to work in place, and does not say so
        allow_tf32=options.allow_tf32,
        recordable=mode != "eager",
        warm_ups=_SCRIPT_WARM_UPS,
        bytes=_bytes(held),
    )
    return _executable(place, work, signature, options, _no_check)


def read_facts(path: Path) -> dict[str, Any]:
    """Read what was written beside a package.

    Raises:
        IncompatibleProgram: It is not what `accelrt_cuda.torch_child.package` returns.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        if not facts.keys() >= PACKAGE_FACTS:
            raise KeyError(*sorted(PACKAGE_FACTS - facts.keys()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise IncompatibleProgram(f"{path.name} cannot be read: {error!r}", backend="torch") from error
    return facts


def read_way(path: Path) -> str:
    """Read how a program runs that could not be compiled ahead of time: ``compile`` or ``graph``.

    Raises:
        IncompatibleProgram: It is neither.
    """
    try:
        way = json.loads(path.read_bytes())["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompatibleProgram(f"{path.name} cannot be read: {error!r}", backend="torch") from error
    if way not in ("compile", "graph"):
        raise IncompatibleProgram(f"{path.name} names no way to run the program: {way!r}.", backend="torch")
    return str(way)


def _executable(
    place: Place,
    work: Work,
    signature: Signature,
    options: TorchCudaOptions,
    check: Callable[[Mapping[str, Value]], None],
) -> TorchExecutable:
    with place.here():
        found = TorchExecutable(place, work, signature, options, check)
    if options.mode == "graph" and _static_shapes(signature) is not None and not found.recordings:
        found.close()
        raise IncompatibleProgram(
            "mode='graph' was asked for, and the program's launches cannot be recorded.",
            hint="Take mode='eager', or 'auto'.",
            backend="torch",
        )
    return found


def _autocast(place: Place, precision: Precision) -> Any:
    # Its cache of cast weights must not outlive a recording, nor be filled by one.
    dtype = getattr(torch, HALVES.get(precision, "bfloat16"))
    return torch.autocast(place.device.type, dtype=dtype, enabled=precision in HALVES, cache_enabled=False)


def _types(ports: Sequence[Port]) -> tuple[str, ...]:
    return tuple(port.type.dtype for port in ports if isinstance(port.type, TensorType))


def _input_types(signature: Signature) -> tuple[Any, ...]:
    return tuple(torch_dtype(name) for name in _types(signature.inputs))


def _output_types(signature: Signature) -> tuple[str, ...]:
    return _types(signature.outputs)


def _storages(tensors: Iterable[Any]) -> frozenset[int]:
    return frozenset(t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor) and t.numel())


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class _Finish:
    """Brings what a program returns to the types that its signature has, in rows without gaps."""

    def __init__(self, signature: Signature, device: Any) -> None:
        self._types = [torch_dtype(name) for name in _output_types(signature)]
        self._device = device

    def __call__(self, results: Iterable[Any]) -> list[Any]:
        found = list(results)
        if len(found) != len(self._types):
            raise TypeError(f"the model returned {len(found)} tensors, and its signature has {len(self._types)}")
        return [self._finished(value, dtype) for value, dtype in zip(found, self._types, strict=True)]

    def _finished(self, value: Any, dtype: Any) -> Any:
        if not isinstance(value, torch.Tensor):  # a size
            return torch.full((), value, dtype=dtype, device=self._device)
        return value.detach().resolve_conj().resolve_neg().to(device=self._device, dtype=dtype).contiguous()


# What is checked before anything reaches the device


def _no_check(inputs: Mapping[str, Value]) -> None:
    return None


class Bounds:
    """Checks places in an axis, such as the numbers of tokens: a kernel that meets one outside ends all of the process'
    work on the device."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)

    def __call__(self, inputs: Mapping[str, Value]) -> None:
        for name, size in self._sizes.items():
            array = inputs[name]
            if 0 in array.shape:
                continue
            low, high = int(array.min()), int(array.max())
            if low < -size or high >= size:
                raise InputError(
                    f"The input {name!r} holds {low if low < -size else high}; it counts places in an axis of {size}, "
                    f"so it takes {-size} to {size - 1}."
                )
