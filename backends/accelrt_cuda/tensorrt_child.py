"""What TensorRT does in the child process: look around, judge nodes, and build. Called by name, with plain data."""

from __future__ import annotations

import base64
import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, CompileError, DeviceError
from accelrt.graph.types import Signature
from accelrt_cuda import tensorrt_cuda as cuda
from accelrt_cuda import tensorrt_timing_cache as timing_cache
from accelrt_cuda.tensorrt_api import LOG, MODULES, bindings, lacking, network_flags, signatures, trt_logger
from accelrt_cuda.tensorrt_errors import CudaFailure, compile_error, from_log, short, tail
from accelrt_cuda.tensorrt_options import TensorRtOptions, ranges

NO_DEVICE = 100  # cudaErrorNoDevice
OLD_DRIVER = 35  # cudaErrorInsufficientDriver: also where there is no driver at all


def probe() -> dict[str, Any]:
    """Return ``version``, ``devices`` and ``driver`` as this process sees them, or ``problem`` and its ``kind``.

    Kinds: ``bindings`` and ``libraries`` of TensorRT, ``cuda-bindings``, ``old`` bindings, no ``device``, no ``driver``
    or an ``old-driver``.
    """
    try:
        trt = bindings()
    except ModuleNotFoundError as error:
        kind = "bindings" if error.name in MODULES else "libraries"
        return {"kind": kind, "problem": short(error)}
    except (ImportError, OSError) as error:
        # The package is there; what it loads is not: libnvinfer, libnvonnxparser, or libraries of CUDA's.
        return {"kind": "libraries", "problem": short(error)}
    version = str(trt.__version__)
    if missing := lacking(trt):
        return {"kind": "old", "version": version, "problem": f"it has no {', '.join(missing)}"}
    try:
        cuda.runtime()
    except (ImportError, OSError) as error:
        return {"kind": "cuda-bindings", "version": version, "problem": short(error)}
    return {"version": version, **_devices()}


def _devices() -> dict[str, Any]:
    driver = built = 0
    try:
        driver, built = int(cuda.checked("cudaDriverGetVersion")), int(cuda.checked("cudaRuntimeGetVersion"))
        found = list(cuda.devices())
    except CudaFailure as error:
        if error.code == OLD_DRIVER:
            told = f"the driver is for CUDA {_dotted(driver)}, the runtime is CUDA {_dotted(built)}"
            return {"kind": "old-driver", "problem": told} if driver else {"kind": "driver", "problem": str(error)}
        return {"kind": "device" if error.code == NO_DEVICE else "driver", "problem": str(error)}
    if not found:
        return {"kind": "device", "problem": "the CUDA runtime counts no device"}
    return {"devices": found, "driver": _dotted(driver), "cuda": _dotted(built)}


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def describe() -> dict[str, Any]:
    """Return what somebody far away needs to see of the bindings: where they come from, and how they are declared."""
    trt = bindings()
    flags = sorted(name for name in dir(trt.BuilderFlag) if name.isupper())
    levels = sorted(name for name in dir(trt.HardwareCompatibilityLevel) if name.isupper())
    return {
        "module": trt.__name__,
        "signatures": signatures(trt),
        "builder_flags": flags,
        "hardware_compatibility_levels": levels,
        "progress_monitor": hasattr(trt, "IProgressMonitor"),
    }


# Which nodes can be parsed


def judge(trials: Sequence[Mapping[str, Any]], precision: str) -> list[str | None]:
    """Return for each node why the parser refuses it, None where it does not.

    Args:
        trials: For each, ``model`` (of one node, as base64) and ``weights`` (its inputs that are to be initialisers).
        precision: What it is to be computed in.
    """
    from accelrt_cuda import tensorrt_model

    reasons: dict[int, str] = {}
    groups: dict[tuple[tuple[str, int], ...], dict[int, Any]] = {}
    for index, trial in enumerate(trials):
        data = base64.b64decode(trial["model"])
        try:
            proto = tensorrt_model.prepared(data, trial["weights"], precision, _prefix(index))
        except AccelrtError as error:
            reasons[index] = f"it cannot be put on trial: {short(error)}"
            continue
        imports = tuple(sorted((entry.domain, entry.version) for entry in proto.opset_import))
        groups.setdefault(imports, {})[index] = proto
    trt = bindings()
    builder = _builder(trt)
    with tempfile.TemporaryDirectory() as folder:
        for group in groups.values():
            tensorrt_model.write_zeros(Path(folder), group.values())
            reasons.update(_refused(trt, builder, group, Path(folder)))
    return [reasons.get(index) for index in range(len(trials))]


def _prefix(index: int) -> str:
    return f"n{index}/"


_OWNER = re.compile(r"n(\d+)/")


def _refused(trt: Any, builder: Any, group: Mapping[int, Any], folder: Path) -> dict[int, str]:
    """Ask about nodes until the parser takes all that are left.

    It looks at every node before it begins, but stops at the first that fails on the way: one round is not enough.
    """
    from accelrt_cuda import tensorrt_model

    left, reasons = dict(group), {}
    while left:
        model = tensorrt_model.together(left.values())
        errors = _errors_of(trt, builder, model, folder)
        if errors is None:
            break
        owners = [node.name for node in model.graph.node]
        found: dict[int, str] = {}
        for error in errors:
            if (owner := _owner(error, owners)) in left:
                found.setdefault(owner, error["reason"])
        if not found:
            # The parser does not say whose fault it is: ask about halves, down to a node alone.
            if len(left) == 1:
                reasons[next(iter(left))] = errors[0]["reason"]
                break
            items = list(left.items())
            middle = len(items) // 2
            for half in (items[:middle], items[middle:]):
                reasons.update(_refused(trt, builder, dict(half), folder))
            break
        reasons.update(found)
        for index in found:
            del left[index]
    return reasons


def _errors_of(trt: Any, builder: Any, model: Any, folder: Path) -> list[dict[str, Any]] | None:
    """Return the parser's errors on a model, None if it takes all of it."""
    mark = LOG.mark()
    data, path = model.SerializeToString(), str(folder / "trial.onnx")
    network = builder.create_network(network_flags(trt))  # the parser writes into it, and does not keep it
    parser = trt.OnnxParser(network, trt_logger())
    if parser.supports_model_v2(data, path):
        return None
    errors = _all_told(parser)
    if not errors:
        # It leaves out nodes whose output sizes hang on values, since not every caller has an allocator for them; this
        # engine has. Whether it can parse them is another question.
        another = builder.create_network(network_flags(trt))
        parsing = trt.OnnxParser(another, trt_logger())
        if parsing.parse(data, path):
            return None
        errors = _all_told(parsing)
    said = tail(LOG.since(mark)) or "it does not say why"
    return errors or [{"node": -1, "name": "", "file": "", "reason": f"the parser refuses it: {said}"}]


def _all_told(parser: Any) -> list[dict[str, Any]]:
    return [_told(parser.get_error(index)) for index in range(parser.num_errors)]


def _told(error: Any) -> dict[str, Any]:
    code = getattr(error.code(), "name", str(error.code()))
    where = f" ({code} in {error.func()})" if error.func() else f" ({code})"
    return {
        "node": int(error.node()),
        "name": str(error.node_name()),
        "file": str(error.file()),
        "reason": f"the parser refuses {error.node_operator() or 'it'}: {short(_OWNER.sub('', error.desc()))}{where}",
    }


def _owner(error: Mapping[str, Any], owners: Sequence[str]) -> int | None:
    """Return the number of the trial that an error is about: by its node's name, else an input's, else by place.

    The place of a node in a body is counted within the body, so names come first.
    """
    for text in (error["name"], error["file"]):
        if found := _OWNER.match(text):
            return int(found.group(1))
    if 0 <= error["node"] < len(owners) and (found := _OWNER.match(owners[error["node"]])):
        return int(found.group(1))
    return None


# Building


def build(
    model: str, plan: str, signature: Mapping[str, Any], precision: str, options: Mapping[str, Any], cache: str | None
) -> None:
    """Build the ONNX file ``model`` and write the plan.

    Args:
        model: An ONNX file with its weights beside it.
        plan: Where to write.
        signature: That of the segment.
        precision: What to compute in.
        options: Those of the engine, as plain data.
        cache: The file of timings, None to do without.

    Raises:
        CompileError: TensorRT refuses or fails; the message has what its parser and its log said.
    """
    chosen = TensorRtOptions(**options)
    ports = Signature.from_json(signature)
    mark = LOG.mark()
    try:
        _build(Path(model), Path(plan), ports, precision, chosen, Path(cache) if cache else None)
    except DeviceError as error:  # of the building, not of a program: the segment goes to the next engine
        raise CompileError(error.message, hint=error.hint, backend=error.backend) from error
    except CudaFailure as error:
        raise compile_error(f"Building the plan failed at {error}.") from error
    except (TypeError, RuntimeError) as error:
        raise compile_error(f"Building the plan failed: {short(error)}. {tail(LOG.since(mark))}".rstrip()) from error


def _builder(trt: Any) -> Any:
    mark = LOG.mark()
    try:
        return trt.Builder(trt_logger())
    except TypeError as error:  # pybind11's, where TensorRT makes none
        raise from_log([*LOG.since(mark), short(error)], "Starting the builder", None, CompileError) from error


def _build(
    model: Path, plan: Path, signature: Signature, precision: str, options: TensorRtOptions, cache: Path | None
) -> None:
    from accelrt.graph.weights import WeightFile
    from accelrt_cuda import tensorrt_model

    trt = bindings()
    sizes = ranges(signature, options)
    builder = _builder(trt)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, trt_logger())
    with tempfile.NamedTemporaryFile(dir=model.parent, prefix="halves", suffix=".bin") as file:
        halves = WeightFile(Path(file.name))
        data = tensorrt_model.segment(model, precision, halves)
        halves.close()
        mark = LOG.mark()
        if not parser.parse(data, str(model)):
            errors = [error["reason"] for error in _all_told(parser)]
            raise compile_error(f"TensorRT cannot parse the segment: {'; '.join(errors) or tail(LOG.since(mark))}.")
        config = _config(trt, builder, options)
        _add_profile(builder, config, network, sizes, dict(options.profiles))
        timings = timing_cache.attach(config, cache) if cache is not None else None
        monitor = _watch(trt, config, options.timeout_s)
        mark = LOG.mark()
        built = builder.build_serialized_network(network, config)
    if timings is not None and cache is not None:
        timing_cache.keep(config, timings, cache)  # also where the build was given up: the next one begins there
    if built is None:
        if monitor is not None and monitor.given_up:
            raise compile_error(
                f"TensorRT had not finished after {options.timeout_s:g} s, in {monitor.where()}.",
                hint="Raise `timeout_s`, or lower `optimization_level`; what was timed is kept for the next build.",
            )
        raise from_log(LOG.since(mark), "Building the plan", cuda.Gpu(0).memory(), CompileError)
    with plan.open("wb") as file_of_plan:
        file_of_plan.write(built)


def _config(trt: Any, builder: Any, options: TensorRtOptions) -> Any:
    config = builder.create_builder_config()
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:  # on unless it is cleared
        (config.set_flag if options.tf32 else config.clear_flag)(tf32)
    if options.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper(), None)
        if level is None:
            raise compile_error(
                f"TensorRT {trt.__version__} has no hardware compatibility {options.hardware_compatibility!r}."
            )
        config.hardware_compatibility_level = level
    if options.version_compatible:
        # Without the lean runtime the plan holds nothing that would run on the host's processor.
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    return config


def _add_profile(builder: Any, config: Any, network: Any, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Tell the sizes of every input that is open, and the values of every input that is read as a shape."""
    profile, needed = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            if tensor.name not in given:
                raise compile_error(
                    f"TensorRT reads the input {tensor.name!r} as a shape, and must know the range of its values.",
                    hint=f"Pass options={{'profiles': {{{tensor.name!r}: (least, best, greatest)}}}} with its values.",
                )
            profile.set_shape_input(tensor.name, *given[tensor.name])
            needed = True
        elif any(size < 0 for size in tuple(tensor.shape)):
            if tensor.name not in sizes:
                raise compile_error(f"The rank of the input {tensor.name!r} is not known to accelrt.")
            profile.set_shape(tensor.name, *sizes[tensor.name])
            needed = True
    if needed and config.add_optimization_profile(profile) < 0:
        raise compile_error(f"TensorRT does not take the profile {dict(sizes)}.")


def _watch(trt: Any, config: Any, timeout_s: float) -> Any:
    """Attach a monitor that says how far a build is, and ends it when its time is up; None where there is none."""
    if not hasattr(trt, "IProgressMonitor") or not hasattr(config, "progress_monitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Its functions are called from several threads of TensorRT's."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._deadline = time.monotonic() + timeout_s
            self._phases: dict[str, tuple[int, int]] = {}
            self._lock = threading.Lock()
            self.given_up = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (0, num_steps)
            if parent_phase is None:
                # The parent shows the end of this if it has to kill the process.
                sys.stderr.write(f"TensorRT: {phase_name}, {num_steps} steps\n")
                sys.stderr.flush()

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._phases[phase_name] = (step + 1, self._phases.get(phase_name, (0, 0))[1])
            self.given_up = self.given_up or time.monotonic() > self._deadline
            return not self.given_up

        def phase_finish(self, phase_name: str) -> None:
            if not self.given_up:
                with self._lock:
                    self._phases.pop(phase_name, None)

        def where(self) -> str:
            with self._lock:
                steps = [f"{name} (step {done} of {count})" for name, (done, count) in self._phases.items()]
            return ", ".join(steps) or "its first phase"

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor
