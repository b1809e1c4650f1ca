"""The contract suite: what every backend promises, as tests to inherit. Needs pytest.

::

    class TestMyBackend(BackendContract):
        backend_class = MyBackend
        sdk_modules = ("mysdk",)

Each test names the promise it holds, in the words of `accelrt.backend`. An engine that is not usable on this machine
skips what must run, with its own reason; the rest is tested all the same. Answers are compared with
``cpu/onnxruntime``. The compile cache is a folder of the test's own. Failures show the values that were compared if
``conftest.py`` says ``pytest.register_assert_rewrite("accelrt.testing.contract")``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

import accelrt
from accelrt.artifact.artifact import Artifact
from accelrt.backend import (
    API_VERSION,
    WHOLE_FILES,
    Backend,
    Caps,
    CompileJob,
    Device,
    DeviceTensor,
    Engine,
    Executable,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.data import digits_model
from accelrt.errors import AccelrtError, CompileError, SessionClosed, UnsupportedNodes, UntrustedProgram
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.node import WEIGHTS_FILE, Node
from accelrt.graph.types import Signature
from accelrt.graph.weights import WeightFile
from accelrt.options import from_json
from accelrt.registry import REGISTRY, devices_of, find_engine, takes_whole
from accelrt.runtime.dlpack import layout_of
from accelrt.runtime.session import Session
from accelrt.sources import SourceOptions, SourceRequest, whole_source
from accelrt.target import Target, parse
from accelrt.testing.models import Array, Builder, mlp, small_cnn

ORACLE = "cpu/onnxruntime"
BATCHES = (1, 5)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")


def mixed() -> onnx.ModelProto:
    """Build a model of many kinds of operators, so that an engine which takes few of them has gaps to fall into."""
    net = Builder("mixed", seed=1)
    x = net.input("x", ("batch", 8))
    x = net.node("Relu", net.node("MatMul", x, net.normal(8, 8, std=0.4)))
    x = net.node("Erf", net.node("Add", x, net.normal(8, std=0.1)))
    x = net.node("CumSum", x, net.constant(1))
    x = net.node("Relu", net.node("Sub", x, net.normal(8, std=0.1)))
    x = net.node("Softmax", x, axis=1)
    net.output(net.node("Mul", x, net.constant(3.0), name="y"), ("batch", 8))
    return net.model()


def views() -> onnx.ModelProto:
    """Build a model that moves no number, so that an engine is tempted to return its input's memory."""
    net = Builder("views")
    x = net.input("x", (4, 6))
    net.output(net.node("Flatten", net.node("Reshape", x, net.constant([2, 2, 6])), name="y"), (2, 12))
    return net.model()


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "small_cnn": small_cnn,
    "digits": lambda: onnx.load(digits_model()),
    "mixed": mixed,
}


@dataclass(frozen=True, slots=True)
class WholeCase:
    """A model in its framework's own form, with what `accelrt.compile` needs to know of it."""

    model: Any
    example_inputs: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


class BackendContract:
    """Derive a class, set `backend_class`, and pytest does the rest.

    Attributes:
        backend_class: The backend under test. It is registered for the tests if it is not installed.
        engine_name: The engine under test; None for the first.
        sdk_modules: Top-level modules of the vendor that importing the backend must not import.
        batch: The size of every open dimension of the models; None leaves them open. For engines of static shapes.
        rtol, atol: How far answers may be from those of the CPU; wider for engines that compute in less than fp32.
        whole_models: For an engine that takes sources whole: functions that build ``mlp``, a model of float tensors
            with an open batch, and ``views``, which takes ``x`` and returns it as ``y`` in another shape. Both must
            convert to ONNX, so that there is something to compare with.
        engine_options: Options of the engine under test, if not its defaults.
    """

    backend_class: ClassVar[type[Backend]]
    engine_name: ClassVar[str | None] = None
    sdk_modules: ClassVar[Sequence[str]] = ()
    batch: ClassVar[int | None] = None
    rtol: ClassVar[float] = 1e-3
    atol: ClassVar[float] = 1e-4
    whole_models: ClassVar[Mapping[str, Callable[[], WholeCase]]] = {}
    engine_options: ClassVar[Mapping[str, Any]] = {}

    # What the tests work with

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep the user's compile cache and target out of the tests."""
        monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.delenv("ACCELRT_BACKEND", raising=False)

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        """The backend as the registry has it: installed, or registered for the test."""
        name = self.backend_class.name
        installed = name in REGISTRY.names()
        if not installed:
            accelrt.register(self.backend_class)
        try:
            found = REGISTRY.backend(name)
            assert isinstance(found, self.backend_class), (
                f"the name {name!r} belongs to {type(found)}, not to the class under test"
            )
            yield found
        finally:
            if not installed:
                REGISTRY.unregister(name)

    @pytest.fixture
    def engine(self, backend: Backend) -> Engine:
        """The engine under test, usable or not."""
        return backend.engines[0] if self.engine_name is None else find_engine(backend, self.engine_name)

    @pytest.fixture
    def usable(self, engine: Engine) -> Engine:
        """The engine under test, if it can compile here."""
        status = engine.status()
        if not status.usable:
            pytest.skip(f"{engine.name} is not usable here: {status.reason}")
        return engine

    @pytest.fixture
    def devices(self, backend: Backend, engine: Engine) -> Sequence[Device]:
        """The devices, if there are any to run on."""
        devices = devices_of(backend, None, engine)
        if not devices:
            pytest.skip(f"backend {backend.name} has no device here")
        return devices

    @pytest.fixture
    def target(self, backend: Backend, usable: Engine) -> str:
        """The engine under test by name."""
        return f"{backend.name}/{usable.name}"

    @pytest.fixture
    def program(self, usable: Engine, tmp_path: Path) -> Program:
        """A program of the engine's own: the longest start of a perceptron that it takes, or one node of a model."""
        job = self.job(usable, tmp_path)
        out = tmp_path / "program"
        out.mkdir()
        return usable.compile(job, out)

    def job(self, engine: Engine, folder: Path) -> CompileJob:
        """Return something to compile that the engine says it supports."""
        if takes_whole(engine):
            return self.whole_job(engine, folder)
        graph = self.something_supported(engine)
        weights = WeightFile(folder / WEIGHTS_FILE)
        graph.write(folder / "segment.onnx", weights)
        weights.close()
        precision = engine.caps.default_precision
        return CompileJob(folder / "segment.onnx", graph.signature, precision, engine.options(**self.engine_options))

    def whole_job(self, engine: Engine, folder: Path) -> CompileJob:
        """Return a source that the engine takes whole."""
        case = self.whole_case("mlp")
        source = whole_source(case.model, SourceRequest(case.example_inputs, options=SourceOptions(**case.options)))
        assert source is not None, "the model of the suite is ONNX, which no engine takes whole"
        model = source.write(folder, engine.formats)
        precision = engine.caps.default_precision
        assert engine.supports_source(model.format, model.signature, precision).supported
        return CompileJob(model.path, model.signature, precision, engine.options(**self.engine_options), model.format)

    def whole_case(self, name: str) -> WholeCase:
        """Return a model in its framework's own form."""
        if name not in self.whole_models:
            pytest.skip(f"the class under test has no whole model {name!r}")
        return self.whole_models[name]()

    def compiled(self, name: str, build: Callable[[], onnx.ModelProto], target: str) -> Artifact:
        """Return a model compiled for the engine under test, in the form that it takes."""
        backend, _, engine = target.partition("/")
        options = {f"{engine}.{key}": value for key, value in self.engine_options.items()}
        if not takes_whole(find_engine(REGISTRY.backend(backend), engine)):
            return accelrt.compile(build(), target, fallback="allow", options=options)
        case = self.whole_case(name)
        return accelrt.compile(
            case.model, target, example_inputs=case.example_inputs, options={**case.options, **options}
        )

    def resident(self, engine: Engine, program: Program, devices: Sequence[Device]) -> Executable:
        """Load a program as the scheduler does: onto as many devices as it says it needs."""
        needed = engine.devices_needed(program.options)
        assert needed >= 1
        if len(devices) < needed:
            pytest.skip(f"the program needs {needed} devices, there are {len(devices)}")
        return engine.load(program, devices[:needed])

    def something_supported(self, engine: Engine) -> Graph:
        """Return the longest start of a perceptron that the engine takes, else a node of any model that it takes."""
        for name in MODELS:
            graph = load_graph(self.build(name))
            verdicts = engine.supports_all(graph.nodes, engine.caps.default_precision)
            start = [index for index, _ in takewhile(lambda pair: pair[1].supported, enumerate(verdicts))]
            single = [index for index, verdict in enumerate(verdicts) if verdict.supported][:1]
            if start or single:
                return graph.extract(start or single)
        pytest.skip(f"{engine.name} takes no node of {', '.join(MODELS)}")

    def build(self, name: str) -> onnx.ModelProto:
        """Return one of `MODELS`, with the sizes that the engine under test needs to know."""
        model = MODELS[name]()
        for value in (*model.graph.input, *model.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if self.batch is not None and not dim.HasField("dim_value"):
                    dim.dim_value = self.batch
        return model

    def close_to(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Fail unless outputs are named, typed, shaped and valued as the oracle's are."""
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert isinstance(found[name], np.ndarray)
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, rtol=self.rtol, atol=self.atol, err_msg=name)

    # Names and data

    def test_names_can_be_written_as_a_target(self, backend: Backend) -> None:
        names = [engine.name for engine in backend.engines]
        assert names
        assert len(set(names)) == len(names)
        for name in names:
            assert parse(f"{backend.name}/{name}") == Target(backend.name, name)

    def test_speaks_this_version_of_the_contract(self, backend: Backend) -> None:
        assert backend.api_version == API_VERSION

    def test_engine_describes_itself_with_data(self, engine: Engine) -> None:
        assert isinstance(engine.caps, Caps)
        assert engine.caps.parallelism >= 1
        assert engine.caps.default_precision in PRECISIONS
        assert engine.formats
        assert all(isinstance(name, str) for name in engine.formats)
        assert isinstance(engine.requires, str)

    def test_devices_are_named_after_the_backend(self, backend: Backend) -> None:
        devices = backend.devices()
        indices = [device.index for device in devices]
        assert len(set(indices)) == len(indices)
        for device in devices:
            assert device.backend == backend.name
            assert device.name == f"{backend.name}:{device.index}"
            assert parse(device.name) == Target(backend.name, None, (device.index,))
            assert device.description
            assert device.memory_bytes is None or device.memory_bytes > 0

    def test_groups_are_cut_from_the_devices(self, backend: Backend) -> None:
        indices = {device.index for device in backend.devices()}
        grouped = [index for group in backend.groups({}, backend.devices()) for index in group.devices]
        assert set(grouped) <= indices
        assert len(set(grouped)) == len(grouped)
        assert bool(grouped) == bool(indices)

    def test_occupants_are_texts_by_device(self, backend: Backend) -> None:
        indices = {device.index for device in backend.devices()}
        occupants = backend.occupants()
        assert set(occupants) <= indices
        for texts in occupants.values():
            assert not isinstance(texts, str), "a sequence of texts, one for each process"
            assert all(isinstance(text, str) and text for text in texts)

    def test_status_says_the_version_or_what_is_missing(self, engine: Engine) -> None:
        status = engine.status()
        assert isinstance(status, Status)
        assert status == engine.status()
        if status.usable:
            assert status.version
            assert status.reason is None
        else:
            assert status.reason, "an engine that is not usable says why"

    def test_options_are_frozen_have_defaults_and_survive_json(self, engine: Engine) -> None:
        options = engine.options()
        assert is_dataclass(options)
        assert not isinstance(options, type)
        for known in fields(options):
            with pytest.raises(FrozenInstanceError):
                setattr(options, known.name, None)
        assert engine.options.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert from_json(engine.options, json.loads(json.dumps(asdict(options)))) == options

    def test_default_options_make_the_same_engine(self, usable: Engine) -> None:
        made = usable.with_options(usable.options())
        assert made.name == usable.name
        assert made.fingerprint() == usable.fingerprint()
        assert made.with_options(usable.options()).fingerprint() == usable.fingerprint()

    def test_devices_of_an_engines_own_belong_to_its_backend(self, backend: Backend, engine: Engine) -> None:
        own = engine.devices()
        assert own is None or own == engine.devices()
        indices = [device.index for device in own or ()]
        assert len(set(indices)) == len(indices)
        assert {device.backend for device in own or ()} <= {backend.name}

    def test_import_brings_in_no_sdk(self) -> None:
        code = (
            "import importlib, sys; importlib.import_module(sys.argv[1]); "
            "print([name for name in sys.argv[2:] if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.backend_class.__module__, *self.sdk_modules],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"

    # What is supported

    @pytest.mark.parametrize("model", MODELS)
    def test_verdicts_are_the_same_each_time_and_all_at_once(self, usable: Engine, model: str) -> None:
        nodes = load_graph(self.build(model)).nodes
        precision = usable.caps.default_precision
        together = usable.supports_all(nodes, precision)
        assert usable.supports_all(nodes, precision) == together
        assert [usable.supports(node, precision) for node in nodes] == together
        assert usable.supports_all(tuple(reversed(nodes)), precision) == together[::-1]
        assert usable.supports_all([], precision) == []
        for node, verdict in zip(nodes, together, strict=True):
            assert isinstance(verdict, Verdict)
            assert verdict.supported or verdict.reason.strip(), f"{node.kind} is refused without a reason"

    def test_every_precision_gets_a_verdict(self, usable: Engine) -> None:
        for precision in PRECISIONS:
            for verdict in usable.supports_all(load_graph(self.build("mlp")).nodes, precision):
                assert verdict.supported or verdict.reason

    def test_an_operator_nobody_knows_is_refused(self, usable: Engine) -> None:
        node = load_graph(self.build("mlp")).nodes[0]
        stranger = _stranger(node)
        verdict = usable.supports(stranger, usable.caps.default_precision)
        assert not verdict.supported
        assert verdict.reason

    # Compiling

    def test_compile_writes_files_and_tells_what_they_depend_on(
        self, usable: Engine, program: Program, tmp_path: Path
    ) -> None:
        assert program.files
        for name, path in program.files.items():
            assert path.is_file(), f"{name} was not written"
            assert path.is_relative_to(tmp_path / "program")
        listed = {path.name for path in program.files.values()}
        assert WEIGHTS_FILE not in listed, "weights of ONNX files are found by themselves"
        assert program.fingerprint
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in program.fingerprint.items())
        assert program.fingerprint == usable.fingerprint() == usable.fingerprint()
        assert program.options == usable.options(**self.engine_options)

    def test_compile_leaves_its_source_alone(self, usable: Engine, tmp_path: Path) -> None:
        job = self.job(usable, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        out = tmp_path / "program"
        out.mkdir()
        assert usable.compile(job, out).signature == job.signature
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    def test_a_program_runs_where_its_files_are_moved(
        self, usable: Engine, devices: Sequence[Device], program: Program, tmp_path: Path
    ) -> None:
        with self.resident(usable, program, devices) as executable:
            expected = executable.run(draw(program.signature, 2))
        moved = tmp_path / "elsewhere"
        (tmp_path / "program").rename(moved)
        files = {name: moved / path.relative_to(tmp_path / "program") for name, path in program.files.items()}
        with self.resident(usable, replace(program, files=files), devices) as executable:
            self.close_to(executable.run(draw(program.signature, 2)), expected)

    # Answers

    @pytest.mark.parametrize("model", MODELS)
    def test_answers_are_those_of_the_cpu(
        self, target: str, devices: Sequence[Device], tmp_path: Path, model: str
    ) -> None:
        if takes_whole(find_engine(REGISTRY.backend(target.partition("/")[0]), target.partition("/")[2])):
            pytest.skip("it takes models whole, not as ONNX")
        proto = self.build(model)
        artifact = accelrt.compile(proto, target, fallback="allow")
        path = artifact.save(tmp_path / "model.accel")
        with (
            accelrt.load(accelrt.compile(proto, ORACLE)) as oracle,
            accelrt.load(artifact) as fresh,
            accelrt.load(path, fallback="error") as saved,
        ):
            for batch in BATCHES:
                inputs = draw(artifact.signature, batch)
                expected = oracle.predict(inputs)
                self.close_to(fresh.predict(inputs), expected)
                self.close_to(saved.predict(inputs), expected)
            assert saved.stats().errors == 0
            assert saved.stats().fallbacks == 0, "the engine did not run what it compiled"

    def test_answers_of_a_whole_model_are_those_of_the_cpu(
        self, target: str, usable: Engine, devices: Sequence[Device], tmp_path: Path
    ) -> None:
        if not takes_whole(usable):
            pytest.skip("it takes segments of graphs")
        case = self.whole_case("mlp")
        artifact = self.compiled("mlp", mlp, target)
        converted = accelrt.compile(case.model, ORACLE, example_inputs=case.example_inputs, options=case.options)
        assert artifact.signature.input_names == converted.signature.input_names
        assert artifact.placement.whole is not None
        assert [segment.engine for segment in artifact.placement.segments] == [target]
        path = artifact.save(tmp_path / "model.accel")
        if usable.caps.executes_code:
            with pytest.raises(UntrustedProgram):
                accelrt.load(path)
        with (
            accelrt.load(converted) as oracle,
            accelrt.load(artifact) as fresh,
            accelrt.load(path, fallback="error", trust=True) as saved,
        ):
            for batch in BATCHES:
                inputs = draw(artifact.signature, batch)
                expected = oracle.predict(inputs)
                self.close_to(fresh.predict(inputs), expected)
                self.close_to(saved.predict(inputs), expected)
            assert saved.stats().fallbacks == 0, "the engine did not run what it compiled"

    def test_an_engine_of_whole_models_takes_no_node_and_no_other_form(self, usable: Engine, tmp_path: Path) -> None:
        if not takes_whole(usable):
            pytest.skip("it takes segments of graphs")
        precision = usable.caps.default_precision
        for verdict in usable.supports_all(load_graph(mlp()).nodes, precision):
            assert not verdict.supported
            assert verdict.reason
        job = self.job(usable, tmp_path)
        for other in sorted({"onnx", *WHOLE_FILES} - set(usable.formats)):
            refusal = usable.supports_source(other, job.signature, precision)
            assert not refusal.supported
            assert refusal.reason
        (tmp_path / "refused").mkdir()
        with pytest.raises(CompileError):
            usable.compile(replace(job, format="onnx"), tmp_path / "refused")

    def test_what_is_refused_runs_elsewhere_and_the_placement_says_so(self, backend: Backend, target: str) -> None:
        engine = find_engine(backend, target.partition("/")[2])
        if takes_whole(engine):
            pytest.skip("it takes models whole: there are no nodes to refuse")
        proto = self.build("mixed")
        nodes = load_graph(proto).nodes
        verdicts = engine.supports_all(nodes, engine.caps.default_precision)
        refused = {n.name: v.reason for n, v in zip(nodes, verdicts, strict=True) if not v.supported}
        placement = accelrt.compile(proto, target, fallback="allow").placement
        owner = {node.name: segment.engine for segment in placement.segments for node in segment.nodes}
        assert set(owner) == {node.name for node in nodes}
        said = {refusal.node: refusal.reason for refusal in placement.refusals if refusal.engine == target}
        for name, reason in refused.items():
            assert owner[name] != target
            assert said[name] == reason
        assert placement.primary == target
        assert all(owner[name] != target for name in said)
        if placement.fallen_back:
            with pytest.raises(UnsupportedNodes):
                accelrt.compile(proto, target, fallback="error")

    # Running

    @pytest.fixture
    def session(self, target: str, devices: Sequence[Device]) -> Iterator[Session]:
        """A perceptron on the engine under test."""
        with accelrt.load(self.perceptron(target)) as session:
            yield session

    def perceptron(self, target: str) -> Artifact:
        """Return the perceptron compiled for the engine under test."""
        return self.compiled("mlp", lambda: self.build("mlp"), target)

    def test_calls_from_several_threads_get_their_own_answers(self, session: Session) -> None:
        calls = [draw(session.signature, 1 + number % 3, seed=number) for number in range(24)]
        expected = [session.predict(inputs) for inputs in calls]
        with ThreadPoolExecutor(4) as pool:
            for found, outputs in zip(pool.map(session.predict, calls), expected, strict=True):
                self.close_to(found, outputs)
        self.close_to(list(session.map(calls))[7], expected[7])

    def test_replicas_answer_alike(self, backend: Backend, target: str, devices: Sequence[Device]) -> None:
        artifact = self.perceptron(target)
        calls = [draw(artifact.signature, 2, seed=number) for number in range(12)]
        with accelrt.load(artifact) as one:
            expected = [one.predict(inputs) for inputs in calls]
            needed = len(one.stats().replicas[0].devices)
        if backend.exclusive and len(devices) < 2 * needed:
            pytest.skip(f"two replicas need {2 * needed} devices, there are {len(devices)}")
        with accelrt.load(artifact, replicas=2) as two:
            for found, outputs in zip(two.map(calls), expected, strict=True):
                self.close_to(found, outputs)
            assert len(two.stats().replicas) == 2

    def test_an_executable_takes_calls_from_several_threads_if_it_says_so(
        self, usable: Engine, devices: Sequence[Device], program: Program
    ) -> None:
        if not usable.caps.concurrent:
            pytest.skip(f"{usable.name} takes one call at a time")
        with self.resident(usable, program, devices) as executable:
            calls = [draw(program.signature, 2, seed=number) for number in range(16)]
            expected = [executable.run(inputs) for inputs in calls]
            with ThreadPoolExecutor(4) as pool:
                for found, outputs in zip(pool.map(executable.run, calls), expected, strict=True):
                    self.close_to(found, outputs)

    def test_outputs_stay_valid_when_run_is_called_again(
        self, usable: Engine, devices: Sequence[Device], program: Program
    ) -> None:
        with self.resident(usable, program, devices) as executable:
            kept = executable.run(draw(program.signature, 2, seed=1))
            copies = {name: np.array(value) for name, value in kept.items()}
            for seed in range(2, 6):
                executable.run(draw(program.signature, 2, seed=seed))
            _equal(kept, copies)
        _equal(kept, copies)

    def test_inputs_are_read_only_to_the_engine(
        self, usable: Engine, devices: Sequence[Device], program: Program
    ) -> None:
        inputs = draw(program.signature, 2)
        copies = {name: value.copy() for name, value in inputs.items()}
        with self.resident(usable, program, devices) as executable:
            expected = executable.run(inputs)
            _equal(inputs, copies)
            for value in inputs.values():
                value.flags.writeable = False  # as of a file that is mapped into memory
            self.close_to(executable.run(inputs), expected)

    def test_outputs_do_not_share_memory_with_inputs(self, target: str, devices: Sequence[Device]) -> None:
        with accelrt.load(self.compiled("views", views, target)) as session:
            x = draw(session.signature, 1)["x"]
            y = session.predict(x)["y"]
            before = y.copy()
            x[...] = -1
            np.testing.assert_array_equal(y, before)

    def test_tensors_stay_on_the_device_if_it_says_so(
        self, usable: Engine, devices: Sequence[Device], program: Program
    ) -> None:
        self.needs_device_tensors(usable)
        names = program.signature.output_names
        with self.resident(usable, program, devices) as executable:
            inputs = draw(program.signature, 2)
            expected = executable.run(inputs)
            copies = {name: value.copy() for name, value in inputs.items()}
            self.close_to(executable.run_resident(inputs, ()), expected)
            kept = executable.run_resident(inputs, names)
            _equal(inputs, copies)
            assert list(kept) == list(names)
            for name, tensor in kept.items():
                assert isinstance(tensor, DeviceTensor)
                assert not isinstance(tensor, np.ndarray), f"{name} is on the host"
                layout = layout_of(tensor)
                assert layout.contiguous
                assert layout.shape == expected[name].shape
                assert layout.dtype == expected[name].dtype.name
            # Kept tensors are memory of their own: the next run leaves them alone.
            later = executable.run_resident(draw(program.signature, 2, seed=1), names)
            fetched = {name: executable.to_host(tensor) for name, tensor in kept.items()}
            self.close_to(fetched, expected)
            for name in names:
                fetched[name][...] = 0  # a copy, which the caller may write to
                np.testing.assert_array_equal(executable.to_host(kept[name]), expected[name], err_msg=name)
            assert list(later) == list(names)

    def test_tensors_on_the_device_are_taken_as_inputs(
        self, usable: Engine, devices: Sequence[Device], program: Program, tmp_path: Path
    ) -> None:
        self.needs_device_tensors(usable)
        with self.resident(usable, program, devices) as executable:
            inputs = draw(program.signature, 2)
            name, expected = next(iter(executable.run(inputs).items()))
            kept = executable.run_resident(inputs, [name])[name]
            with self.resident(usable, self.rectifier(usable, expected.shape, tmp_path), devices) as other:
                outputs = other.run({"x": expected})
                for _ in range(2):  # what is given stays as it is, and may be given again
                    self.close_to(other.run_resident({"x": kept}, ()), outputs)
                again = other.run_resident({"x": kept}, ["y"])["y"]
                self.close_to(other.run_resident({"x": again}, ()), outputs)
                np.testing.assert_array_equal(executable.to_host(kept), expected)
                self.close_to({"y": other.to_host(again)}, outputs)

    def test_tensors_on_the_device_may_come_and_go_from_several_threads(
        self, usable: Engine, devices: Sequence[Device], program: Program
    ) -> None:
        self.needs_device_tensors(usable)
        if not usable.caps.concurrent:
            pytest.skip(f"{usable.name} takes one call at a time")
        names = program.signature.output_names
        with self.resident(usable, program, devices) as executable:
            calls = [draw(program.signature, 2, seed=number) for number in range(32)]
            expected = [executable.run(inputs) for inputs in calls]

            def fetch(inputs: Mapping[str, Any]) -> dict[str, Any]:
                kept = executable.run_resident(inputs, names)
                return {name: executable.to_host(tensor) for name, tensor in kept.items()}

            with ThreadPoolExecutor(4) as pool:
                for found, outputs in zip(pool.map(fetch, calls), expected, strict=True):
                    self.close_to(found, outputs)

    def test_predict_leaves_outputs_on_the_device_and_takes_them_from_there(
        self, backend: Backend, usable: Engine, target: str, devices: Sequence[Device]
    ) -> None:
        self.needs_device_tensors(usable)
        with accelrt.load(self.perceptron(target)) as session:
            inputs = draw(session.signature, 3)
            (name,) = session.signature.output_names
            expected = session.predict(inputs)[name]
            kept = session.predict(inputs, outputs="device")[name]
            shape = expected.shape
        if isinstance(kept, np.ndarray):
            pytest.skip(f"{usable.name} does not take the last node of the perceptron")
        assert isinstance(kept, DeviceTensor)
        where = backend.dlpack_device(devices[0])
        assert where is None or tuple(map(int, kept.__dlpack_device__())) == where
        if not usable.supports(rectifier(shape).nodes[0], usable.caps.default_precision).supported:
            return
        with accelrt.load(accelrt.compile(rectifier_model(shape), target, fallback="error")) as session:
            found = session.predict(kept)["y"]
            self.close_to({"y": found}, {"y": np.maximum(expected, 0)})
            crossed = session.stats().host_bytes
            assert crossed == found.nbytes * (1 if where is not None else 2)

    def needs_device_tensors(self, engine: Engine) -> None:
        """Skip the test of an engine whose tensors do not stay on the device."""
        if not engine.caps.device_tensors:
            pytest.skip(f"{engine.name} leaves no tensors on the device")

    def rectifier(self, engine: Engine, shape: Sequence[int], folder: Path) -> Program:
        """Compile a program of one Relu, from ``x`` to ``y``."""
        graph = rectifier(shape)
        precision = engine.caps.default_precision
        if not engine.supports(graph.nodes[0], precision).supported:
            pytest.skip(f"{engine.name} takes no Relu")
        source, out = folder / "rectifier", folder / "rectifier_program"
        source.mkdir()
        out.mkdir()
        graph.write(source / "segment.onnx", weights := WeightFile(source / WEIGHTS_FILE))
        weights.close()
        options = engine.options(**self.engine_options)
        return engine.compile(CompileJob(source / "segment.onnx", graph.signature, precision, options), out)

    def test_close_is_final(self, usable: Engine, devices: Sequence[Device], program: Program) -> None:
        executable: Executable = self.resident(usable, program, devices)
        inputs = draw(program.signature, 1)
        executable.run(inputs)
        executable.close()
        with pytest.raises(Exception):  # noqa: B017 - engines raise what they like, but raise they must
            executable.run(inputs)

    def test_a_closed_session_says_so(self, target: str, devices: Sequence[Device]) -> None:
        session = accelrt.load(self.perceptron(target))
        inputs = draw(session.signature, 1)
        session.predict(inputs)
        session.close()
        session.close()
        with pytest.raises(SessionClosed):
            session.predict(inputs)

    def test_two_sessions_of_one_artifact_do_not_disturb_each_other(
        self, target: str, devices: Sequence[Device]
    ) -> None:
        artifact = self.perceptron(target)
        inputs = draw(artifact.signature, 3)
        with accelrt.load(artifact) as first:
            with accelrt.load(artifact) as second:
                self.close_to(first.predict(inputs), second.predict(inputs))
            first.predict(inputs)

    def test_a_device_that_does_not_exist_is_an_error(
        self, backend: Backend, target: str, devices: Sequence[Device]
    ) -> None:
        absent = max(device.index for device in devices) + 1
        with pytest.raises(AccelrtError, match=f"no device {absent}"):
            accelrt.load(self.perceptron(target), devices=absent, fallback="error")


def rectifier_model(shape: Sequence[int]) -> onnx.ModelProto:
    """Build a model of one Relu, from ``x`` to ``y``."""
    net = Builder("rectifier")
    net.output(net.node("Relu", net.input("x", shape), name="y"), shape)
    return net.model()


def rectifier(shape: Sequence[int]) -> Graph:
    """Return `rectifier_model` as a graph."""
    return load_graph(rectifier_model(shape))


def draw(signature: Signature, batch: int, seed: int = 0) -> dict[str, Array]:
    """Draw float inputs for a signature of plain tensors; every open dimension is ``batch``."""
    generator = np.random.default_rng(seed)
    inputs = {}
    for port in signature.inputs:
        shape: Any = port.type.shape  # type: ignore[union-attr]
        sizes = [dim if isinstance(dim, int) else batch for dim in shape]
        inputs[port.name] = generator.standard_normal(sizes).astype(np.float32)
    return inputs


def _stranger(node: Node) -> Node:
    domain, operator = "com.example.nowhere", "NoSuchOperator"
    proto = onnx.helper.make_node(operator, node.inputs, node.outputs, domain=domain)
    return replace(node, domain=domain, op_type=operator, version=1, opset=1, proto=proto)


def _equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
