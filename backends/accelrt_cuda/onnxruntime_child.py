"""What onnxruntime does in a child process: everything that tries, since its providers end processes when they fail.

Called by name through `accelrt.isolation`, with plain data. ``module`` is onnxruntime's name, always: a stand-in has
another.
"""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import CompileError
from accelrt_cuda.diagnosis import CUDNN
from accelrt_cuda.failures import short
from accelrt_cuda.onnxruntime_options import CPU, CUDA, CudaOnnxRuntimeOptions
from accelrt_cuda.onnxruntime_session import (
    ERRORS_ONLY,
    absent_provider,
    assignments,
    remark,
    runtime,
    session,
    shape_nodes,
    strays,
    to_json,
)

_STRICT = CudaOnnxRuntimeOptions(cudnn_conv_algo_search="default", cpu_nodes="none")
_AS_PLACED = CudaOnnxRuntimeOptions(cudnn_conv_algo_search="default", cpu_nodes="any")


def probe(module: str, device_id: int) -> dict[str, Any]:
    """Return versions, and the newest opsets and IR version, or ``problem``: why nothing runs on CUDA."""
    from accelrt.graph.kernel_table import newest_versions

    ort = _runtime(module)
    if CUDA not in ort.get_available_providers():
        return {"problem": f"it has no {CUDA}, only {', '.join(ort.get_available_providers())}"}
    try:
        made = session(ort, _relu(), _STRICT, device_id, quiet=True)
    except Exception as error:  # noqa: BLE001 - the text of whatever it raises is the reason
        return {"problem": short(error)}
    if absent_provider(made, _STRICT) is not None:
        return {"problem": f"its session has {', '.join(made.get_providers())} instead of {CUDA}"}
    if [node.provider for node in assignments(made)] != [CUDA]:
        return {"problem": "a Relu was not placed on CUDA"}
    schemas = ort.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    opsets, ir_version = newest_versions(lambda model: _cpu_takes(ort, model), schemas)
    return {
        "version": str(ort.__version__),
        "cuda": str(getattr(ort, "cuda_version", "") or "unknown"),
        "cudnn": _cudnn_version(),
        "opsets": opsets,
        "ir_version": ir_version,
    }


def kernels(module: str) -> list[list[Any]]:
    """Return CUDA's kernels: domain, operator, range of versions, types by variable.

    Asked of a child of its own: where a library of any provider is missing, TensorRT's included, onnxruntime 1.31.1
    ends the process instead of answering. Builds whose CUDA provider is a plug-in answer for it alone.
    """
    state = _runtime(module).capi.onnxruntime_pybind11_state
    try:
        listed = state.get_registered_ep_kernel_defs(CUDA)
    except (AttributeError, RuntimeError):
        listed = state.get_all_opkernel_def()
    return [
        [k.domain, k.op_name, list(k.version_range), {name: list(types) for name, types in k.type_constraints.items()}]
        for k in listed
        if k.provider == CUDA
    ]


def try_out(module: str, device_id: int, models: Sequence[str]) -> list[str | None]:
    """Return for each model, as base64, why CUDA does not run all of it, None if it does."""
    ort = _runtime(module)
    return [_trial(ort, base64.b64decode(text), device_id) for text in models]


def _trial(ort: Any, model: bytes, device_id: int) -> str | None:
    try:
        made = session(ort, model, _AS_PLACED, device_id, optimise=False, quiet=True)
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen classes that share no base
        return f"refused on trial: {short(error)}"
    elsewhere = {node.op_type for node in assignments(made) if node.provider != CUDA}
    if elsewhere:
        return f"onnxruntime places {', '.join(sorted(elsewhere))} on the CPU: no CUDA kernel takes it as it is"
    return None


def build(module: str, model: str, device_id: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make a session of the ONNX file ``model`` on CUDA; return where its nodes are, and what is to be said of that.

    Raises:
        CompileError: There is no such session, or nodes are on the CPU that may not be.
    """
    import onnx

    ort, chosen = _runtime(module), CudaOnnxRuntimeOptions(**options)
    try:
        made = session(ort, model, chosen, device_id)
    except Exception as error:
        raise CompileError(f"onnxruntime: {short(error)}", backend="cuda/onnxruntime") from error
    if (absent := absent_provider(made, chosen)) is not None:
        raise CompileError(
            f"onnxruntime dropped {absent}, whose libraries it cannot load.",
            hint="`accelrt doctor cuda` says which are missing.",
            backend="cuda/onnxruntime",
        )
    placed = assignments(made)
    proto = onnx.load(model, load_external_data=False)
    if stray := strays(placed, shape_nodes(proto), chosen):
        named = ", ".join(f"{node.name or '(unnamed)'} ({node.op_type})" for node in stray[:5])
        more = f" and {len(stray) - 5} more" if len(stray) > 5 else ""
        raise CompileError(
            f"onnxruntime would run {len(stray)} of {len(placed)} nodes on the CPU: {named}{more}.",
            hint="Pass the option cpu_nodes='any' to let it; the placement will name them.",
            backend="cuda/onnxruntime",
        )
    return {"placed": to_json(placed), "remark": remark(placed, chosen)}


def _runtime(module: str) -> Any:
    """Return onnxruntime, with errors alone in the log of the process, which is a child and nobody's but ours.

    Otherwise onnxruntime 1.31.1 warns at every session that its CUDA provider is no plug-in. In the caller's process
    that log is the caller's: its level can be set and not be read, so it could not be put back.
    """
    ort = runtime(module)
    ort.set_default_logger_severity(ERRORS_ONLY)
    return ort


def _cpu_takes(ort: Any, model: Any) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except Exception:  # noqa: BLE001 - an unknown version is what is being looked for
        return False
    return True


def _relu() -> bytes:
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "probe", ports[:1], ports[1:])
    made: bytes = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)]
    ).SerializeToString()
    return made


def _cudnn_version() -> str:
    """Return cuDNN's version as it tells: ``91002`` is 9.10.2; empty if it cannot be loaded."""
    try:
        library = ctypes.CDLL(CUDNN)
        library.cudnnGetVersion.restype = ctypes.c_size_t
        number = int(library.cudnnGetVersion())
    except (OSError, AttributeError):
        return ""
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def weight_bytes(files: Sequence[Path]) -> int:
    """Return the size of a program's files, weights beside them included."""
    folders = {path.parent for path in files}
    return sum(path.stat().st_size for path in files) + sum(
        beside.stat().st_size for folder in folders if (beside := folder / "weights.bin").is_file()
    )
