"""The engine `neuron/tensorflow-neuron`: Inf1 through tensorflow-neuron, of TensorFlow 1 or 2.

It takes SavedModels as a whole; the vendor's partitioner decides what of them runs on the device. Support ended with
SDK 2.26 (TensorFlow 1: 2.20).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelrt import isolation
from accelrt.backend import (
    SUPPORTED,
    WHOLE_FILES,
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
from accelrt.errors import CompileError, CoresUnavailable, IncompatibleProgram, OptionError
from accelrt.graph.node import Node
from accelrt.graph.types import Signature, TensorType, Value, numpy_dtype
from accelrt_neuron import nrt
from accelrt_neuron.archive import keep, unpack
from accelrt_neuron.cores import PLACEMENT, CoreRange, core_range
from accelrt_neuron.flags import (
    cast_mode,
    check_cast_options,
    check_limits,
    neuron_cc_args,
    neuron_cc_environment,
)
from accelrt_neuron.sdk import TENSORFLOW_NEURON
from accelrt_neuron.support import NO_FLOAT32_PRODUCT, unusual_signature
from accelrt_neuron.tensorflow_child import PROGRAM
from accelrt_neuron.torch_engines import FACTS, SPARE_S

_VISIBLE = "NEURON_RT_VISIBLE_CORES"


@dataclass(frozen=True, slots=True)
class TensorFlowNeuronOptions:
    """Options of the engine.

    Attributes:
        auto_cast: What is cast in bf16 and fp16: ``all`` or ``matmult``; None for ``all``.
        pipeline_cores: Cores over which the compiler spreads one program as a pipeline.
        dynamic_batch: Let the vendor split other batches into ones of the size compiled for.
        minimum_segment_size: Smaller parts stay on the CPU (TensorFlow 1); None for the vendor's default.
        signature_key: Which signature of the SavedModel; None for ``serving_default``.
        min_coverage: The least share of operators on the device; 0.3 is where the vendor begins to call it a success.
        timeout_s: Seconds until the compiler is stopped.
    """

    auto_cast: str | None = None
    pipeline_cores: int = 1
    dynamic_batch: bool = False
    minimum_segment_size: int | None = None
    signature_key: str | None = None
    min_coverage: float = 0.3
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_cast_options(self.auto_cast, None)
        if self.pipeline_cores < 1:
            raise OptionError(f"pipeline_cores must be 1 or more, not {self.pipeline_cores}.")
        check_limits(self.min_coverage, self.timeout_s)


class TensorFlowNeuronEngine(Engine):
    """tensorflow-neuron with neuron-cc. Compiles on any machine; runs where there is an Inf1."""

    name: ClassVar[str] = "tensorflow-neuron"
    formats: ClassVar[tuple[str, ...]] = ("saved_model",)
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, default_precision="bf16", executes_code=True)
    options: ClassVar[type] = TensorFlowNeuronOptions
    requires: ClassVar[str] = TENSORFLOW_NEURON.install

    def __init__(self, options: TensorFlowNeuronOptions | None = None, facts: dict[str, Any] | None = None) -> None:
        self._options = options or TensorFlowNeuronOptions()
        self._facts = {} if facts is None else facts

    def with_options(self, options: Any) -> Engine:
        return self if options == self._options else TensorFlowNeuronEngine(options, self._facts)

    def status(self) -> Status:
        return TENSORFLOW_NEURON.status(self.facts())

    def facts(self) -> Mapping[str, Any] | None:
        """Return what the child found out about the vendor's package, None if there is none; asked once."""
        if not _tensorflow_neuron_is_there():
            return None
        if not self._facts:
            self._facts.update(TENSORFLOW_NEURON.probe())
        return self._facts

    def fingerprint(self) -> Mapping[str, str]:
        versions = (self.facts() or {}).get("versions", {})
        chosen = self._options
        flags = f"auto_cast={chosen.auto_cast} pipeline_cores={chosen.pipeline_cores}"
        return {**versions, "target": "inf1", "flags": flags}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return Verdict.refuse("tensorflow-neuron takes SavedModels as a whole, no segments of ONNX")

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        """Tell whether a model can be compiled as a whole: its form, its types and sizes, the precision."""
        if format not in self.formats:
            return Verdict.refuse(f"it takes {', '.join(self.formats)}, and the source is {format}")
        if precision == "fp32":
            return Verdict.refuse(NO_FLOAT32_PRODUCT)
        try:
            cast_mode(precision, "v1", self._options.auto_cast)
        except CompileError as error:
            return Verdict.refuse(error.message.rstrip("."))
        reason = unusual_signature(signature)
        return SUPPORTED if reason is None else Verdict.refuse(reason)

    def compile(self, job: CompileJob, out: Path) -> Program:
        if job.format == "onnx":
            raise CompileError(
                "tensorflow-neuron takes SavedModels as a whole, no segments of ONNX.", backend=self.name
            )
        program = self.compile_source(job.model, job.format, job.signature, job.precision, job.options, out)
        ratio = json.loads(program.files[FACTS].read_text())["coverage"]["on_neuron_ratio"]
        name = WHOLE_FILES[job.format]
        files = {**program.files, name: keep(job.model, out / name)}
        return replace(program, files=files, remark=f"{ratio:.0%} of the operators on the device")

    def compile_source(
        self, source: Path, format: str, signature: Signature, precision: Precision, options: Any, out: Path
    ) -> Program:
        """Compile a SavedModel, a folder or a zip file of one, into the empty folder ``out``.

        ``signature`` has static sizes, and the names of the SavedModel's own signature unless the zip file says others.

        Raises:
            CompileError: The compiler refused or failed, with the end of its log; or too little landed on the device.
        """
        if format != "saved_model":
            raise CompileError(f"tensorflow-neuron takes SavedModels, no {format!r}.", backend=self.name)
        mode = cast_mode(precision, "v1", options.auto_cast)
        if precision == "fp32":
            raise CompileError(f"{NO_FLOAT32_PRODUCT}.", backend=self.name)
        arguments = neuron_cc_args(mode, options.pipeline_cores)
        flags = neuron_cc_environment(mode, options.pipeline_cores, options.dynamic_batch)
        found = isolation.call(
            "accelrt_neuron.tensorflow_child:build",
            timeout_s=options.timeout_s + SPARE_S,
            source=str(source),
            signature=signature.to_json(),
            plan={
                "compiler_args": arguments,
                "environment_flags": flags,
                "dynamic_batch": options.dynamic_batch,
                "compiler_timeout": int(options.timeout_s),
                "minimum_segment_size": options.minimum_segment_size,
                "signature_key": options.signature_key,
            },
            out=str(out),
        )
        ratio = float(found["on_neuron_ratio"])
        if ratio < options.min_coverage or ratio == 0:
            raise CompileError(
                f"{ratio:.0%} of the operators landed on the device, where at least {options.min_coverage:.0%} were "
                f"asked for.",
                hint="The option min_coverage says how many must.",
                backend=self.name,
            )
        facts = {
            "engine": self.name,
            "tensorflow": found["tensorflow"],
            "compiler_args": arguments if found["tensorflow"] == 1 else flags.split(),
            "auto_cast": mode.what,
            "auto_cast_type": mode.type,
            "coverage": {"on_neuron_ratio": ratio},
            "inputs": found["inputs"],
            "outputs": found["outputs"],
        }
        (out / FACTS).write_text(json.dumps(facts))
        files = {PROGRAM: out / PROGRAM, FACTS: out / FACTS}
        return Program(files, self.fingerprint(), signature, options, precision)

    def devices_needed(self, options: Any) -> int:
        return int(options.pipeline_cores)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        cores = core_range(devices, self.name)
        facts = json.loads(program.files[FACTS].read_text())
        folder = Path(tempfile.mkdtemp(prefix="accelrt-tfneuron-"))
        try:
            unpack(program.files[PROGRAM], folder)
            tf = importlib.import_module("tensorflow")
            if int(str(tf.__version__).partition(".")[0]) != facts["tensorflow"]:
                raise IncompatibleProgram(
                    f"The program was compiled for TensorFlow {facts['tensorflow']}, and here is {tf.__version__}.",
                    backend=self.name,
                )
            with PLACEMENT:
                _claim(cores, self.name)
                importlib.import_module("tensorflow.neuron")  # registers the operators of programs
                try:
                    run = _predictor(tf, folder) if facts["tensorflow"] == 1 else _function(tf, folder)
                except (RuntimeError, ValueError, tf.errors.OpError) as error:
                    raise nrt.typed(error, "Loading the program", self.name) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return _TensorFlowProgram(run, program.signature, folder, tf.errors.OpError, facts)


def _tensorflow_neuron_is_there() -> bool:
    """Look for the package's folder: asking for the spec of a submodule would import TensorFlow."""
    try:
        found = importlib.util.find_spec("tensorflow")
    except (ImportError, ValueError):
        return False
    places = [] if found is None else list(found.submodule_search_locations or ())
    return any((Path(place) / "neuron").is_dir() for place in places)


_CLAIMED: list[CoreRange] = []


def _claim(cores: CoreRange, engine: str) -> None:
    """Narrow the process to these cores: tensorflow-neuron places by itself, on those that the process may see.

    The runtime reads the variable once, when it starts, so the first load of a process decides for all.
    """
    if not _CLAIMED:
        _CLAIMED.append(cores)
        if not os.environ.get(_VISIBLE):
            os.environ[_VISIBLE] = str(cores.start) if cores.count == 1 else f"{cores.start}-{cores.ids[-1]}"
    elif _CLAIMED[0] != cores:
        raise CoresUnavailable(
            f"This process runs tensorflow-neuron on the cores {_CLAIMED[0].ids}, and the runtime takes others only "
            f"when it starts; asked for were {cores.ids}.",
            hint="Load the program in a process of its own.",
            backend=engine,
        )


def _predictor(tf: Any, folder: Path) -> Any:
    return tf.contrib.predictor.from_saved_model(str(folder))


def _function(tf: Any, folder: Path) -> Any:
    """Return a function of a dictionary; the loaded model is kept by it."""
    model = tf.keras.models.load_model(str(folder))
    serving = model.signatures["serving_default"]

    def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        results = serving(**{name: tf.constant(value) for name, value in feeds.items()})
        return {name: value.numpy() for name, value in results.items()}

    run.model = model  # type: ignore[attr-defined]  # a signature holds its model weakly
    return run


class _TensorFlowProgram(Executable):
    def __init__(
        self, run: Any, signature: Signature, folder: Path, failure: type[Exception], facts: Mapping[str, Any]
    ) -> None:
        self._run, self._folder, self._engine = run, folder, str(facts["engine"])
        self._inputs: Mapping[str, str] = facts["inputs"]
        self._names: Mapping[str, str] = facts["outputs"]
        self._failures = (RuntimeError, ValueError, failure)
        self._outputs = [
            (port.name, numpy_dtype(port.type.dtype)) for port in signature.outputs if isinstance(port.type, TensorType)
        ]

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        if self._run is None:
            raise RuntimeError("the executable was closed")
        try:
            results = self._run({self._inputs[name]: value for name, value in inputs.items()})
        except self._failures as error:
            raise nrt.typed(error, "Running the program", self._engine) from error
        return {name: np.array(results[self._names[name]], dtype=dtype, copy=True) for name, dtype in self._outputs}

    def close(self) -> None:
        self._run = None
        shutil.rmtree(self._folder, ignore_errors=True)
