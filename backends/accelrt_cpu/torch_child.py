"""What runs in the child process for `cpu/torch`: a probe, and AOTInductor, which writes C++ and runs its compiler."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from typing import Any

from accelrt.errors import CompileError
from accelrt.graph.exported import writes

_COMPILERS = ("g++", "clang++", "c++")
# Operators whose result may be their argument's memory, besides those whose schema says so.
_PASS_ON = frozenset({"reshape", "contiguous", "to", "flatten", "expand_as", "type_as", "dropout", "identity"})


def probe() -> str:
    """Return torch's version, after it has computed something."""
    import torch

    if torch.ones(2).sum().item() != 2:
        raise CompileError("torch cannot add one and one")
    return str(torch.__version__)


def cpp_compiler() -> str | None:
    """Return the C++ compiler that inductor would run, None if there is none."""
    named = os.environ.get("CXX")
    return next((found for name in ((named,) if named else _COMPILERS) if (found := shutil.which(name))), None)


def package(*, model: str, target: str) -> dict[str, Any]:
    """Compile an exported program to machine code.

    Returns:
        ``shapes``: for each input its sizes, a name for each that is open; ``limits``: for each name the least and the
        greatest size, None for no limit. ``refused`` instead: why the compiled form would not be safe.

    Raises:
        CompileError: Inductor or its compiler failed.
    """
    import torch

    if cpp_compiler() is None:
        return {"refused": "there is no C++ compiler"}
    logging.getLogger("torch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(model)
        if (reason := _unsafe(program)) is not None:
            return {"refused": reason}
        try:
            # The number of threads is not fixed in the code, so that the option holds when it runs.
            torch._inductor.aoti_compile_and_package(
                program, package_path=target, inductor_configs={"cpp.dynamic_threads": True}
            )
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CompileError(f"AOTInductor: {type(error).__name__}: {' '.join(lines[:2])[:400]}") from error
    return {
        "shapes": [[size if isinstance(size, int) else str(size) for size in shape] for shape in _shapes(program)],
        "limits": {str(name): _limits(span) for name, span in program.range_constraints.items()},
    }


def _limits(span: Any) -> list[int | None]:
    low, high = (int(end) if end.is_Integer and abs(int(end)) < 1 << 62 else None for end in (span.lower, span.upper))
    # torch assumes of every open size that it is 2 or more, and means by it that it is no constant 0 or 1.
    return [low if low is not None and low > 2 else None, high]


def _shapes(program: Any) -> list[Any]:
    """Return the shape of each input that is a tensor."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return [values[spec.arg.name].shape for spec in specs if type(spec.arg).__name__ == "TensorArgument"]


def _unsafe(program: Any) -> str | None:
    """Return why compiled code must not be used for a program: it checks nothing that torch itself would check."""
    signature = program.graph_signature
    if writes(program):
        return "it has operators that work in place"
    if any(type(result.arg).__name__ != "TensorArgument" for result in signature.output_specs):
        return "it returns other things than tensors"
    nodes = {node.name: node for node in program.graph.nodes}
    for size in (size for shape in _shapes(program) for size in shape):
        if not isinstance(size, int) and not str(size).isidentifier():
            return f"an input has the size {size}, which compiled code does not check"
    users = {spec.arg.name for spec in signature.input_specs if spec.kind.name == "USER_INPUT"}
    for result in signature.output_specs:
        origin = _origin(nodes[result.arg.name])
        if origin.op == "placeholder" and origin.name not in users:
            return "it returns a weight as it is"
    return None


def _origin(node: Any) -> Any:
    """Follow an output back through what may only be a view, to where its memory comes from."""
    while node.op == "call_function" and node.args and hasattr(node.args[0], "op"):
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            break
        aliased = any(returned.alias_info is not None for returned in schema.returns)
        if not aliased and schema.name.rpartition("::")[2] not in _PASS_ON:
            break
        node = node.args[0]
    return node
