"""What runs in a child process for `cuda/torch`: a probe of the GPU, and AOTInductor, which runs compilers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelrt.backend import Precision
from accelrt.errors import CompileError
from accelrt.graph.types import Signature, TensorType

_FIRST_SIZE, _SIZES = 8, (128, 96, 160, 112, 144)
"""What open dimensions are while a model is exported, of batches and of others; kernels are tuned for these."""


def probe(*, device: str) -> dict[str, Any]:
    """Look whether torch computes on a device.

    Returns:
        ``torch``: its version; ``cuda``: that of CUDA it is built for; ``capability``: ``9.0`` for the first device;
        ``problem`` if it does not compute there, with ``remedy``.
    """
    import torch

    found: dict[str, Any] = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda), "capability": "none"}
    if device == "cpu":
        return found
    if torch.version.cuda is None:
        return found | {"problem": f"torch {torch.__version__} is built without CUDA", "remedy": "pip install torch"}
    if not torch.cuda.is_available():
        return found | {
            "problem": f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU that it can use",
            "remedy": "nvidia-smi",
        }
    try:
        major, minor = torch.cuda.get_device_capability(0)
        if torch.ones(2, device="cuda").sum().item() != 2:
            return found | {"problem": "the GPU adds one and one to something else", "remedy": "nvidia-smi"}
    except RuntimeError as error:
        return found | {"problem": " ".join(str(error).split())[:300], "remedy": "nvidia-smi"}
    return found | {"capability": f"{major}.{minor}"}


def package(
    *,
    model: str,
    format: str,
    signature: Mapping[str, Any],
    precision: Precision,
    settings: Mapping[str, Any],
    device: str,
    channels_last: bool,
    allow_tf32: bool,
    target: str,
) -> dict[str, Any]:
    """Compile a segment of ONNX, or an exported program, to machine code for this machine's first GPU.

    Args:
        model: The file.
        format: ``onnx`` or ``torch.export``.
        signature: As JSON.
        precision: fp32, bf16 or fp16; exported programs take fp32.
        settings: Inductor's.
        device: ``cuda``, or ``cpu`` in tests.
        channels_last: How convolutions are laid out.
        allow_tf32: How float32 is multiplied.
        target: Where the package goes.

    Returns:
        ``shapes``: for each input its sizes, a name for each that is open; ``limits``: for each name the least and the
        greatest size, None for no limit; ``bounds``: `accelrt_cuda.torch_prepare.Prepared.bounds`; ``capability``.
        ``refused`` instead: why the compiled form would not be safe, or do for one size only.

    Raises:
        CompileError: The segment cannot be lowered, or inductor or its compiler failed.
    """
    import torch

    from accelrt_cuda.torch_math import float32_math

    logging.getLogger("torch").setLevel(logging.ERROR)
    ports = Signature.from_json(signature)
    with warnings.catch_warnings(), torch.no_grad(), float32_math(allow_tf32=allow_tf32):
        warnings.simplefilter("ignore")
        try:
            program, bounds, depends = _exported(Path(model), format, ports, precision, device, channels_last)
            if depends:
                return {"refused": f"what it does depends on values: {'; '.join(depends)}"}
            if (reason := _unsafe(program, ports)) is not None:
                return {"refused": reason}
            torch._inductor.aoti_compile_and_package(program, package_path=target, inductor_configs=dict(settings))
        except CompileError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CompileError(
                f"AOTInductor: {type(error).__name__}: {' '.join(lines[:3])[:600]}", backend="torch"
            ) from error
    return {
        "shapes": [[size if isinstance(size, int) else str(size) for size in shape] for shape in _shapes(program)],
        "limits": {str(name): _limits(span) for name, span in program.range_constraints.items()},
        "bounds": bounds,
        "capability": _capability(device),
    }


def _capability(device: str) -> str:
    import torch

    return "none" if device == "cpu" else ".".join(map(str, torch.cuda.get_device_capability(0)))


def _exported(
    model: Path, format: str, signature: Signature, precision: Precision, device: str, channels_last: bool
) -> tuple[Any, dict[str, int], tuple[str, ...]]:
    """Return the program, the bounds of its inputs, and why it cannot be exported: empty if it was."""
    import torch

    if format != "onnx":
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(torch.export.load(model), _first(device)), {}, ()
    from accelrt_cuda.torch_prepare import prepare

    prepared = prepare(model, precision, _first(device), channels_last=channels_last)
    if prepared.depends:
        return None, {}, prepared.depends
    sizes = _Sizes()
    examples, open_axes = [], []
    for port in signature.inputs:
        examples.append(sizes.example(port.type, device=_first(device)))
        shape = port.type.shape if isinstance(port.type, TensorType) else None
        axes = [axis for axis, size in enumerate(shape or ()) if not isinstance(size, int)]
        open_axes.append(dict.fromkeys(axes, torch.export.Dim.AUTO))
    exported = torch.export.export(prepared.module, tuple(examples), dynamic_shapes=tuple(open_axes), strict=False)
    return exported, prepared.bounds, ()


def _first(device: str) -> str:
    return device if device == "cpu" else f"{device}:0"


class _Sizes:
    """Gives open dimensions sizes: the same to the same name, different ones to others."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._spare = iter([*_SIZES, *range(176, 1000, 16)])

    def example(self, type_: Any, *, device: str) -> Any:
        """Return a tensor of zeros of a type."""
        import torch

        from accelrt.graph.lowering.dtypes import torch_dtype

        shape = [self._size(axis, size) for axis, size in enumerate(type_.shape)]
        return torch.zeros(shape, dtype=torch_dtype(type_.dtype), device=device)

    def _size(self, axis: int, size: int | str | None) -> int:
        if isinstance(size, int):
            return size
        if size is None:
            return _FIRST_SIZE if axis == 0 else next(self._spare)
        if size not in self._known:
            self._known[size] = _FIRST_SIZE if axis == 0 else next(self._spare)
        return self._known[size]


def _shapes(program: Any) -> list[Any]:
    """Return the shape of each input that is a tensor."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return [values[spec.arg.name].shape for spec in specs if type(spec.arg).__name__ == "TensorArgument"]


def _limits(span: Any) -> list[int | None]:
    low, high = (int(end) if end.is_Integer and abs(int(end)) < 1 << 62 else None for end in (span.lower, span.upper))
    # torch assumes of every open size that it is 2 or more, and means by it that it is no constant 0 or 1.
    return [low if low is not None and low > 2 else None, high]


def _unsafe(program: Any, signature: Signature) -> str | None:
    """Return why compiled code must not be used for a program: it checks nothing that torch itself would check."""
    from accelrt.graph.exported import writes

    if writes(program):
        return "it has operators that work in place"
    if any(type(result.arg).__name__ != "TensorArgument" for result in program.graph_signature.output_specs):
        return "it returns other things than tensors"
    shapes = _shapes(program)
    if len(shapes) != len(signature.inputs):
        return "it has inputs that are no tensors"
    for port, shape in zip(signature.inputs, shapes, strict=True):
        declared = port.type.shape if isinstance(port.type, TensorType) else None
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and not str(size).isidentifier():
                return f"an input has the size {size}, which compiled code does not check"
            if isinstance(size, int) and declared is not None and not isinstance(declared[axis], int):
                return f"dimension {axis} of {port.name!r} is open, and the code would be for {size} only"
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    nodes = {node.name: node for node in program.graph.nodes}
    for result in program.graph_signature.output_specs:
        origin = _origin(nodes[result.arg.name])
        if origin.op == "placeholder" and origin.name not in users:
            return "it returns a weight as it is"
    return None


def _origin(node: Any) -> Any:
    """Follow an output back through what may only be a view, to where its memory comes from."""
    for before in _chain(node):
        node = before
    return node


def _chain(node: Any) -> Iterator[Any]:
    while node.op == "call_function" and node.args and hasattr(node.args[0], "op"):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(returned.alias_info is not None for returned in schema.returns):
            return
        node = node.args[0]
        yield node
