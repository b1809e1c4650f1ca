"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from typer.testing import CliRunner

import accelrt
from accelrt.backend import CompileJob, Program
from accelrt.cli import app, bench_compare, common, demo, doctor, values
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import InputError
from accelrt.graph.types import OptionalType, Port, SequenceType, Signature, TensorType
from accelrt.partition.report import Placement
from accelrt.registry import REGISTRY, Registry
from accelrt.testing.fake import FakeBackend, FakeEngine
from accelrt.testing.models import mlp

DIGITS = str(digits_model())


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ACCELRT_BACKEND", "ACCELRT_TRACEBACK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(demo, "TIME_S", 0.05)


@pytest.fixture
def toy() -> Iterator[str]:
    """A backend that takes Gemm alone."""
    accelrt.register(FakeBackend.configured("toy", operators={"Gemm"}))
    yield "toy"
    REGISTRY.unregister("toy")


@pytest.fixture
def perceptron(tmp_path: Path) -> str:
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp(), path)
    return str(path)


@pytest.fixture
def artifact(tmp_path: Path) -> str:
    return str(accelrt.compile(digits_model()).save(tmp_path / "digits.accel"))


def invoke(*arguments: object, code: int = 0) -> Any:
    """Run a command line in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def document(*arguments: object, code: int = 0) -> Any:
    """Run with ``--json`` and return the one document on stdout."""
    return json.loads(invoke(*arguments, "--json", code=code).stdout, parse_constant=_no_constant)


def _no_constant(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def model(text: str, folder: Path, name: str = "m.onnx") -> str:
    onnx.save(parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'), folder / name)
    return str(folder / name)


def process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "accelrt", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )


# The program as a whole


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['accelrt', *sys.argv[1:]]\n"
        "from accelrt.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = 'numpy onnx onnx_ir onnxruntime torch openvino'.split()\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    verbs = ("doctor", "compile", "explain", "run", "verify", "bench", "demo")
    for arguments in (["--help"], ["--version"], *([verb, "--help"] for verb in verbs)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout
        assert done.stderr.strip() == "[]"


def test_help_documents_exit_codes() -> None:
    text = " ".join(invoke("--help").stdout.split())
    for words in ("Exit codes: 0 fine", "3 accelrt refused", "130 interrupted"):
        assert words in text


def test_version_and_module() -> None:
    assert invoke("--version").stdout == f"accelrt {accelrt.__version__}\n"
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"accelrt {accelrt.__version__}\n", "")


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "accelrt"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert accelrt.__version__ in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["run"],
        ["run", DIGITS, "--bogus"],
        ["run", DIGITS, "--random", "--dim", "batch"],
        ["run", DIGITS, "--random", "--dim", "batch=0"],
        ["run", DIGITS, "--random", "--dim", "batch=x"],
        ["run", DIGITS, "--dim", "batch=2"],
        ["compile", DIGITS],
        ["compile", DIGITS, "-o", "/no/such/folder/x.accel"],
        ["compile", DIGITS, "-o", DIGITS],
        ["compile", DIGITS, "-o", "x.accel", "--fallback", "maybe"],
        ["compile", DIGITS, "-o", "x.accel", "--option", "threads"],
        ["compile", DIGITS, "-o", "x.accel", "--option", "threads=1", "--option", "threads=2"],
        ["bench", DIGITS, "--number", "0"],
        ["bench", DIGITS, "--number", "2", "--seconds", "1"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert invoke(*arguments, code=2).stdout == ""


def test_errors_are_3_with_message_and_hint_and_no_traceback() -> None:
    done = process("explain", "nowhere.onnx")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: There is no file 'nowhere.onnx'.\nhint: Accepted: ONNX")
    assert "Traceback" not in done.stderr


def test_errors_are_a_document_with_json() -> None:
    error = document("explain", DIGITS, "--backend", "nothing", code=3)["error"]
    assert error["type"] == "TargetError"
    assert "nothing" in error["message"]
    assert error["hint"]


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in invoke("run", "nowhere.onnx", "--traceback", code=3).stderr
    monkeypatch.setenv("ACCELRT_TRACEBACK", "0")
    assert "Traceback" not in invoke("run", "nowhere.onnx", code=3).stderr
    monkeypatch.setenv("ACCELRT_TRACEBACK", "1")
    assert "Traceback" in invoke("run", "nowhere.onnx", code=3).stderr


def test_interrupt_is_130() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "accelrt", "bench", DIGITS, "--seconds", "60", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2.5)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    assert (stdout, stderr) == ("", "Interrupted.\n")


@pytest.mark.parametrize("arguments", [["explain", DIGITS], ["doctor", "neuron", "--json"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.Popen(
        [sys.executable, "-m", "accelrt", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, stderr = child.communicate(timeout=60)
    assert stderr == ""
    assert child.returncode in (0, 1, 141)
    if arguments[0] != "--help":
        assert child.returncode == 141


def test_closed_stdout_is_survived() -> None:
    command = f"exec {sys.executable} -m accelrt explain {DIGITS} --json >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr


class _NoisyEngine(FakeEngine):
    def compile(self, job: CompileJob, out: Path) -> Program:
        print("a library greets the world")
        os.write(1, b"and so does its C part\n")
        return super().compile(job, out)


class _NoisyBackend(FakeBackend):
    name = "noisy"

    def __init__(self) -> None:
        self.engines = (_NoisyEngine(self.config),)


def test_what_libraries_print_stays_out_of_the_document(capfd: pytest.CaptureFixture[str]) -> None:
    accelrt.register(_NoisyBackend)
    try:
        assert document("explain", DIGITS, "-b", "noisy")["primary"] == "noisy/fake"
    finally:
        REGISTRY.unregister("noisy")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "C part" in captured.err


def test_every_verb_prints_one_document(artifact: str, tmp_path: Path) -> None:
    for arguments in (
        ["doctor"],
        ["compile", DIGITS, "-o", tmp_path / "x.accel"],
        ["explain", artifact],
        ["run", artifact, "--random"],
        ["bench", artifact, "--number", "3", "--warmup", "1"],
    ):
        done = process(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout, parse_constant=_no_constant), dict)
        assert done.stderr == ""


# doctor


def test_doctor_lists_every_engine() -> None:
    found = document("doctor")
    (cpu,) = [backend for backend in found["backends"] if backend["name"] == "cpu"]
    engines = {engine["name"]: engine for engine in cpu["engines"]}
    assert {"onnxruntime", "openvino", "reference"} <= set(engines)
    assert engines["onnxruntime"]["usable"]
    assert engines["onnxruntime"]["version"]
    assert cpu["devices"][0]["name"] == "cpu:0"
    text = invoke("doctor").stdout
    assert "onnxruntime" in text
    assert "cpu:0" in text


def test_doctor_says_what_is_usable() -> None:
    for name in ("cpu", "cpu/onnxruntime", "cpu:0"):
        assert f"{name} is usable." in invoke("doctor", name).stdout
        assert document("doctor", name)["problem"] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("tpu", "no backend 'tpu'"), ("cpu/magic", "no engine 'magic'"), ("cpu:99", "no device 99")],
)
def test_doctor_is_1_for_what_is_unknown(name: str, words: str) -> None:
    assert words in invoke("doctor", name, code=1).stdout
    assert words in document("doctor", name, code=1)["problem"]


def test_doctor_is_1_for_what_is_not_usable_and_says_what_helps() -> None:
    accelrt.register(FakeBackend.configured("absent", unusable="the-missing-sdk is not installed"))
    try:
        for name in ("absent", "absent/fake"):
            text = invoke("doctor", name, code=1).stdout
            assert "the-missing-sdk is not installed" in text
            assert "pip install the-missing-sdk" in text
        assert invoke("doctor").exit_code == 0
    finally:
        REGISTRY.unregister("absent")


def test_doctor_lists_broken_and_duplicate_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("cpu", "accelrt_cpu:CpuBackend", "accelrt.backends"),
        EntryPoint("cpu", "somebody:ElsesBackend", "accelrt.backends"),
        EntryPoint("torn", "no_such_module:Backend", "accelrt.backends"),
    ]
    registry = Registry(lambda: points)
    monkeypatch.setattr("accelrt.inventory.REGISTRY", registry)
    monkeypatch.setattr("accelrt.registry.REGISTRY", registry)
    entries = document("doctor")["backends"]
    assert [entry["name"] for entry in entries if entry["reason"] is None] == ["cpu"]
    reasons = {entry["name"]: entry["reason"] for entry in entries if entry["reason"] is not None}
    assert "no_such_module" in reasons["torn"]
    assert "taken by accelrt_cpu:CpuBackend" in reasons["cpu"]
    assert "no_such_module" in invoke("doctor", "torn", code=1).stdout
    assert invoke("doctor", "cpu").exit_code == 0


def test_doctor_marks_emulators_and_backends_without_devices() -> None:
    from accelrt.backend import Status
    from accelrt.inventory import BackendInfo, EngineInfo

    engine = EngineInfo("emulator", Status(True, "1"), nature="emulated", default_precision="bf16")
    stream = io.StringIO()
    from rich.console import Console

    for part in doctor._describe(BackendInfo("neuron", "accelrt", None, (engine,), ())):
        Console(file=stream, width=120).print(part)
    assert "emulated" in stream.getvalue()
    assert "no devices" in stream.getvalue()


def test_doctor_survives_a_wrong_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_BACKEND", "NOT A TARGET")
    assert "ACCELRT_BACKEND" in document("doctor")["default"]


# compile and explain


def test_compile_writes_an_artifact_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "d.accel"
    found = document("compile", DIGITS, "-o", path, "-b", "cpu/reference", "--no-cache", "--no-sources")
    assert found["bytes"] == path.stat().st_size
    assert found["nodes_by_engine"] == {"cpu/reference": 10}
    assert found["fallen_back"] == 0
    assert Signature.from_json(found["signature"]).input_names == ("image",)
    with accelrt.load(path) as session:
        assert session.predict(np.zeros((1, 1, 8, 8), np.float32))["scores"].shape == (1, 10)
    text = invoke("compile", DIGITS, "-o", path).stdout
    assert "10 on cpu/onnxruntime; 1 segment" in text


def test_compile_passes_options_and_names_on(tmp_path: Path) -> None:
    path = tmp_path / "d.accel"
    names = ["--input-name", "pixels", "--output-name", "logits"]
    invoke("compile", DIGITS, "-o", path, "--option", "threads=1", "--option", "onnxruntime.spinning=false", *names)
    with accelrt.load(path) as session:
        assert session.signature.input_names == ("pixels",)
        assert session.signature.output_names == ("logits",)
    from accelrt.artifact.artifact import open_artifact

    (segment,) = open_artifact(path).manifest.segments
    assert segment.options["threads"] == 1
    assert segment.options["spinning"] is False
    assert "threats" in invoke("compile", DIGITS, "-o", path, "--option", "threats=1", code=3).stderr


def test_compile_warns_allows_or_refuses_fallback(toy: str, perceptron: str, tmp_path: Path) -> None:
    path = tmp_path / "x.accel"
    warned = invoke("compile", perceptron, "-o", path, "-b", toy)
    assert warned.stderr.startswith("warning: 2 of 5 nodes do not run on toy/fake")
    assert "accelrt explain" in warned.stdout
    assert invoke("compile", perceptron, "-o", path, "-b", toy, "--fallback", "allow").stderr == ""
    path.unlink()
    refused = invoke("compile", perceptron, "-o", path, "-b", toy, "--fallback", "error", code=3)
    assert "Relu" in refused.stderr
    assert not path.exists()


def test_compile_says_that_the_file_cannot_be_written(tmp_path: Path) -> None:
    invoke("compile", DIGITS, "-o", tmp_path, code=2)


@pytest.mark.torch
def test_compile_takes_torchscript_with_an_example(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    traced = torch.jit.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    traced.save(str(tmp_path / "m.pt"))
    np.savez(tmp_path / "example.npz", input=np.zeros((1, 4), np.float32))
    done = process(
        "compile", tmp_path / "m.pt", "-o", tmp_path / "m.accel", "--example", tmp_path / "example.npz", "--json"
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_explain_is_the_placement(artifact: str, toy: str, perceptron: str) -> None:
    data = document("explain", artifact)
    signature = data.pop("signature")
    assert Placement.from_json(data) == accelrt.compile(digits_model()).placement
    assert Signature.from_json(signature).output_names == ("scores",)
    text = invoke("explain", perceptron, "-b", toy).stdout
    assert "toy/fake 3 (60 %)" in text
    assert "Relu is not among the operators of this stand-in" in text
    assert "belongs" not in invoke("explain", perceptron, "-b", toy, "--all").stderr


def test_explain_shows_brackets_and_colons_as_they_are(tmp_path: Path, toy: str) -> None:
    path = model("g (float[N] x) => (float[N] y) { y = Relu(x) }", tmp_path)
    proto = onnx.load(path)
    proto.graph.node[0].name = "[bold]/block:gear:[/]"
    onnx.save(proto, path)
    assert "[bold]/block:gear:[/]" in invoke("explain", path, "-b", toy).stdout


def test_an_artifact_takes_no_target(artifact: str) -> None:
    for verb in (["explain"], ["run", "--random"], ["bench"]):
        assert "compiled already" in invoke(*verb, artifact, "-b", "cpu", code=3).stderr


# run


def test_run_reads_every_kind_of_input(artifact: str, tmp_path: Path) -> None:
    images = held_out_digits()[0][:2]
    np.save(tmp_path / "a=b.npy", images)
    np.savez(tmp_path / "x.npz", image=images)
    (tmp_path / "x.json").write_text(json.dumps({"image": images.tolist()}))
    (tmp_path / "list.json").write_text(json.dumps(images.tolist()))
    with accelrt.load(artifact) as session:
        expected = session.predict(images)["scores"]
    for text in ("{}/a=b.npy", "image={}/a=b.npy", "{}/x.npz", "image={}/x.npz", "{}/x.json", "{}/list.json"):
        found = document("run", artifact, "--input", text.format(tmp_path))["outputs"]["scores"]
        assert (found["dtype"], found["shape"]) == ("float32", [2, 10])
        np.testing.assert_allclose(np.array(found["values"], np.float32), expected, rtol=1e-6)


def test_run_draws_inputs_and_writes_outputs(tmp_path: Path) -> None:
    arguments = ["run", DIGITS, "--random", "--dim", "batch=3", "--output", tmp_path / "o.out"]
    first = document(*arguments, "--seed", "1")["outputs"]
    assert document(*arguments, "--seed", "1")["outputs"] == first
    with np.load(tmp_path / "o.out", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["scores"], np.array(first["scores"]["values"], np.float32))
    assert document(*arguments, "--seed", "2")["outputs"] != first
    text = invoke(*arguments).stdout
    assert "float32[3, 10]" in text
    assert "o.out" in text
    assert "is not" not in text
    assert "cannot be written" in invoke(*arguments[:3], "--output", tmp_path, code=3).stderr


def test_run_says_what_json_cannot(tmp_path: Path) -> None:
    path = model("g (float[N] x) => (float[N] y) { y = Log(x) }", tmp_path)
    (tmp_path / "x.json").write_text("[0, -1, 1]")
    values_ = document("run", path, "-i", tmp_path / "x.json")["outputs"]["y"]["values"]
    assert values_ == ["-Infinity", "NaN", 0.0]
    assert "not finite" in invoke("run", path, "-i", tmp_path / "x.json").stdout


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def _hostile_files(folder: Path) -> dict[str, str]:
    """Write files that must be refused, and return by name what the refusal says."""
    bomb = _Bomb(folder / "exploded")
    (folder / "pickle.npy").write_bytes(pickle.dumps(bomb))
    np.save(folder / "object.npy", np.array([bomb], object), allow_pickle=True)
    np.savez(folder / "object.npz", image=np.array([bomb], object))
    (folder / "empty.npy").write_bytes(b"")
    np.save(folder / "cut.npy", np.zeros((1, 1, 8, 8), np.float32))
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-7])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n"
    (folder / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    code = b"{'descr': __import__('os').mkdir('exploded'), 'fortran_order': False, 'shape': (1,), }\n"
    (folder / "code.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(code).to_bytes(2, "little") + code)
    (folder / "torn.npz").write_bytes(b"PK\x03\x04 not a zip")
    with zipfile.ZipFile(folder / "other.npz", "w") as archive:
        archive.writestr("image.npy", b"no array")
    (folder / "torn.json").write_text('{"image": [')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes(b'"\xff\xfe"')
    (folder / "text.json").write_text('["a"]')
    (folder / "ragged.json").write_text("[[1], [1, 2]]")
    (folder / "object.json").write_text('{"image": {"a": 1}}')
    (folder / "x.txt").write_text("1 2 3")
    np.save(folder / "shape.npy", np.zeros((1, 8, 8), np.float32))
    np.save(folder / "dtype.npy", np.zeros((1, 1, 8, 8), np.float64))
    np.savez(folder / "name.npz", picture=np.zeros((1, 1, 8, 8), np.float32))
    return {
        "pickle.npy": "allow_pickle",
        "object.npy": "allow_pickle",
        "object.npz": "allow_pickle",
        "empty.npy": "cannot be read",
        "cut.npy": "cannot be read",
        "huge.npy": "cannot be read",
        "code.npy": "cannot be read",
        "torn.npz": "cannot be read",
        "other.npz": "cannot be read",
        "torn.json": "cannot be read",
        "deep.json": "cannot be read",
        "latin.json": "cannot be read",
        "text.json": "takes float32[batch, 1, 8, 8]",
        "ragged.json": "ragged",
        "object.json": "found a dict",
        "x.txt": "not an input file",
        "shape.npy": "found shape [1, 8, 8]",
        "dtype.npy": "dtype float64",
        "name.npz": "'image'",
        "missing.npy": "No such file",
    }


def test_run_refuses_hostile_and_unfit_files(artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, words in _hostile_files(folder).items():
        result = invoke("run", artifact, "--input", folder / name, code=3)
        message = " ".join(result.stderr.split())
        assert words in message, f"{name}: {message}"
        assert "Traceback" not in message
    assert not (folder / "exploded").exists()


def test_run_says_which_input_is_missing_unknown_or_twice(tmp_path: Path) -> None:
    path = model("g (float[N] a, float[N] b) => (float[N] y) { y = Add(a, b) }", tmp_path)
    np.save(tmp_path / "v.npy", np.ones(2, np.float32))
    v = tmp_path / "v.npy"
    assert "--random" in invoke("run", path, code=3).stderr
    assert "'b'" in invoke("run", path, "-i", f"a={v}", code=3).stderr
    assert "Write NAME=" in invoke("run", path, "-i", v, code=3).stderr
    assert "twice" in invoke("run", path, "-i", f"a={v}", "-i", f"a={v}", code=3).stderr
    assert "'c'" in invoke("run", path, "-i", f"a={v}", "-i", f"b={v}", "-i", f"c={v}", code=3).stderr
    assert "'batch'" in invoke("run", path, "--random", "--dim", "batch=2", code=3).stderr
    found = document("run", path, "-i", f"a={v}", "--random", "--dim", "N=2")["outputs"]["y"]
    assert found["shape"] == [2]


def test_random_inputs_fit_their_types() -> None:
    signature = Signature(
        (
            Port("f", TensorType("float32", ("n", 3))),
            Port("h", TensorType("bfloat16", (None, 2))),
            Port("i", TensorType("int64", ("n",))),
            Port("q", TensorType("int4", (4,))),
            Port("b", TensorType("bool", ())),
            Port("t", TensorType("string", (2,))),
            Port("c", TensorType("complex64", (2,))),
            Port("s", SequenceType(TensorType("float32", ("m",)))),
            Port("o", OptionalType(TensorType("float32", (1,)))),
        ),
        (),
    )
    from accelrt.runtime.inputs import Binder

    inputs = values.random_inputs(signature, {"n": 5}, 0)
    bound = Binder(signature).bind((inputs,))
    assert bound["f"].shape == (5, 3)
    assert bound["h"].shape == (1, 2)
    assert set(bound["i"].tolist()) <= {0, 1}
    assert bound["b"].shape == ()
    assert [item.shape for item in bound["s"]] == [(1,), (1,)]
    for value in (*bound.values(), None, [bound["c"]]):
        json.dumps(values.to_json(value), allow_nan=False)
    assert values.to_json(bound["h"])["dtype"] == "bfloat16"
    assert values.to_json(bound["t"]) == {"dtype": "string", "shape": [2], "values": ["text", "text"]}
    with pytest.raises(InputError, match="any rank"):
        values.random_inputs(Signature((Port("x", TensorType("float32")),), ()), {}, 0)


def test_outputs_of_every_type_can_be_written(tmp_path: Path) -> None:
    import ml_dtypes

    outputs = {
        "file": np.ones(2, np.float32),
        "allow_pickle": np.array(["a", "bc"], object),
        "a/b": np.array([1.5], ml_dtypes.bfloat16),
        "q": np.array([-3], ml_dtypes.int4),
        "s": [np.zeros(1), np.ones((1, 2))],
        "none": None,
    }
    values.write_npz(tmp_path / "o.npz", outputs)
    with np.load(tmp_path / "o.npz", allow_pickle=False) as stored:
        assert set(stored.files) == {"file", "allow_pickle", "a/b", "q", "s.0", "s.1"}
        assert stored["allow_pickle"].tolist() == ["a", "bc"]
        assert stored["a/b"].tolist() == [1.5]
        assert stored["q"].tolist() == [-3]


# bench


def test_bench_compares_targets() -> None:
    arguments = ["bench", DIGITS, "-b", "cpu", "-b", "cpu/reference", "--dim", "batch=4", "--threads", "1"]
    found = document(*arguments, "--number", "23", "--warmup", "1")
    first, second = found["results"]
    assert (found["batch"], found["inputs"]) == (4, {"image": "float32[4, 1, 8, 8]"})
    assert [first["n"], second["n"]] == [23, 23]
    assert first["ratio"] == 1
    assert second["ratio"] < 1
    assert first["p50_ms"] <= first["p90_ms"] <= first["p95_ms"] <= first["p99_ms"] <= first["max_ms"]
    assert first["throughput_per_s"] == pytest.approx(4000 / first["mean_ms"])
    assert first["max_difference"] is None
    assert second["max_difference"] < 1e-3
    assert (first["threads"], second["threads"]) == (1, None)
    assert second["nodes_by_engine"] == {"cpu/reference": 10}
    assert "cpu:0" in found["devices"]


def test_bench_shows_where_it_ran(toy: str, perceptron: str) -> None:
    text = invoke("bench", perceptron, "-b", toy, "-b", "cpu", "--seconds", "0.05", "--warmup", "1").stdout
    assert "3 on toy/fake (stand-in), 2 on cpu/onnxruntime" in text
    assert "per s" in text
    assert "toy:0: stand-in" in text


def _contestant(name: str, calls: list[str]) -> Any:
    session = SimpleNamespace(predict=lambda inputs: calls.append(name))
    return bench_compare.Contestant(name, None, session, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [1, 7, 10, 25])
def test_bench_takes_turns_and_counts(number: int) -> None:
    calls: list[str] = []
    pair = [_contestant("a", calls), _contestant("b", calls)]
    bench_compare.measure(pair, {}, bench_compare.Effort(3, number, 0))
    assert [len(contestant.nanoseconds) for contestant in pair] == [number, number]
    rounds = min(10, number)
    turns = "".join(calls)[6:].replace("aa", "a")
    assert "".join(calls)[:6] == "aaabbb"
    assert len(calls) == 2 * (3 + number + rounds)
    assert turns.count("ab") >= rounds


def test_batch_is_the_first_dimension_that_all_share() -> None:
    def size(*shapes: Any, sizes: dict[str, int] | None = None) -> int:
        ports = [Port(str(i), TensorType("float32", shape)) for i, shape in enumerate(shapes)]
        return bench_compare.batch_size(Signature(tuple(ports[:-1]), tuple(ports[-1:])), sizes or {})

    assert size(("n", 3), ("n", 2), sizes={"n": 7}) == 7
    assert size(("n", 3), ("n", 2)) == 1
    assert size((8, 3), (8, 2)) == 8
    assert size((8, 3), (4, 2)) == 1
    assert size((16,), (16,)) == 1
    assert size(None, ("n", 1), sizes={"n": 7}) == 1
    assert size(("n", 3), ("m", 2), sizes={"n": 7}) == 1


# demo


def test_demo_agrees_with_what_was_recorded() -> None:
    result = invoke("demo", "-b", "cpu", "-b", "cpu/reference")
    assert "All 2 engines agree: 448 of 450" in result.stdout
    assert "7/7" in result.stdout
    found = document("demo", "-b", "cpu")
    assert found["agree"]
    assert found["results"][0]["correct"] == found["recorded_correct"]
    assert found["results"][0]["single"]["n"] > 0


def test_demo_is_1_if_the_accuracy_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelrt.data.digits_facts", lambda: SimpleNamespace(correct=449))
    problems = document("demo", "-b", "cpu", code=1)["problems"]
    assert problems == ["cpu gets 448 of 450 digits right; recorded were 449."]


def test_demo_notices_engines_that_disagree() -> None:
    def trial(target: str, scores: list[list[float]]) -> Any:
        array = np.array(scores)
        return SimpleNamespace(target=target, scores=array, predicted=array.argmax(axis=1))

    labels = np.array([0, 1])
    good = trial("a", [[1, 0], [0, 1]])
    assert demo._problems([good, good], labels, 2) == []
    assert len(demo._problems([good, trial("b", [[0, 1], [0, 1]])], labels, 2)) == 3
    assert len(demo._problems([good, trial("b", [[1.1, 0], [0, 1]])], labels, 2)) == 1
    assert len(demo._problems([good, trial("b", [[1, np.nan], [0, 1]])], labels, 2)) >= 1
    assert demo._problems([], labels, 2) == ["No engine is usable here; `accelrt doctor` says why."]


def test_demo_goes_on_where_an_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    accelrt.register(FakeBackend.configured("lost", lost_after=0))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(demo, "SINGLE_CALLS", 2)
    monkeypatch.setattr(demo, "BATCH_CALLS", 2)
    try:
        found = document("demo")  # the CPU answers in its place
        assert "lost/fake" in [result["target"] for result in found["results"]]
    finally:
        REGISTRY.unregister("lost")


def test_digits_are_drawn_with_half_blocks() -> None:
    image = np.array([[0, 1, 0, 1], [0, 0, 1, 1]], np.float32)
    assert demo.draw_digit(image, colour=False).plain == " ▀▄█"
    coloured = demo.draw_digit(image, colour=True)
    assert coloured.plain == "▀▀▀▀"
    assert str(coloured.spans[1].style) == "#ffffff on #000000"


# Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("after", "drawn"), [(0.0, True), (60.0, False)])
def test_progress_is_drawn_only_if_the_work_takes_long(
    monkeypatch: pytest.MonkeyPatch, after: float, drawn: bool
) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(common, "PROGRESS_AFTER_S", after)
    monkeypatch.setenv("TERM", "xterm")
    with common.CompileProgress() as progress:
        time.sleep(0.2)
        progress("compiling segments", 1, 3)
        time.sleep(0.2)
    assert ("compiling segments" in terminal.getvalue()) is drawn


def test_progress_is_silent_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "PROGRESS_AFTER_S", 0.0)
    with common.CompileProgress() as progress:
        progress("compiling segments", 1, 3)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


# verify


@pytest.fixture
def wrong() -> Iterator[str]:
    """A backend whose Gemm is off by 3e-2."""

    def distort(kinds: tuple[str, ...], outputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value * np.float32(1.03) if "Gemm" in kinds else value for name, value in outputs.items()}

    accelrt.register(FakeBackend.configured("wrong", distorts=distort))
    yield "wrong"
    REGISTRY.unregister("wrong")


def test_verify_passes_and_fails_by_its_exit_code(wrong: str, tmp_path: Path) -> None:
    images, labels = held_out_digits()
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    given = ("--input", tmp_path / "images.npy", "--labels", tmp_path / "labels.npy")
    assert "within tolerance" in invoke("verify", DIGITS).stdout
    passed = document("verify", DIGITS, "-b", wrong, "--tolerance", "4e-2", *given)
    assert passed["passed"] is True
    assert passed["outputs"][0]["accuracy"] == pytest.approx([448 / 450, 448 / 450])
    failed = document("verify", DIGITS, "-b", wrong, "--localise", code=1)
    assert failed["culprit"]["kind"].startswith("Gemm-")
    assert failed["outputs"][0]["relative_l2"] == pytest.approx(3e-2, rel=1e-3)
    assert "First out of tolerance: node" in invoke("verify", DIGITS, "-b", wrong, "--localise", code=1).stdout


def test_verify_takes_artifacts_and_says_what_it_cannot_take(artifact: str, tmp_path: Path) -> None:
    assert document("verify", artifact, "--dim", "batch=3", "--reference", "float64")["outputs"][0]["rows"] == 3
    assert document("verify", artifact, "--precision", "fp32", code=3)["error"]["type"] == "OptionError"
    np.save(tmp_path / "labels.npy", np.zeros(1, np.int64))
    error = document("verify", artifact, "--labels", tmp_path / "labels.npy", code=3)["error"]
    assert "Labels need the inputs" in error["message"]


def test_compile_verifies_and_explain_shows_it(wrong: str, tmp_path: Path) -> None:
    out = tmp_path / "m.accel"
    assert (
        document("compile", DIGITS, "-o", out, "-b", wrong, "--verify", code=3)["error"]["type"] == "VerificationError"
    )
    assert not out.exists()
    invoke("compile", DIGITS, "-o", out, "--verify")
    assert "Verified against" in invoke("explain", out).stdout
    assert document("explain", out)["verification"]["passed"] is True


def test_compile_calibrates_for_int8(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "more.npz", image=images)
    out = tmp_path / "m.accel"
    calibrate = ["--calibrate", tmp_path / "images.npy", "--calibrate", tmp_path / "more.npz"]
    document("compile", DIGITS, "-o", out, "-p", "int8", *calibrate)
    assert document("explain", out)["segments"][0]["precision"] == "int8"
    assert "calibrate" in document("compile", DIGITS, "-o", out, "-p", "int8", code=3)["error"]["message"]
    assert document("compile", DIGITS, "-o", out, *calibrate, code=3)["error"]["type"] == "OptionError"


def test_compile_chooses(tmp_path: Path) -> None:
    out = tmp_path / "m.accel"
    auto = ["-b", "auto", "--objective", "throughput", "--precision", "fp32", "--option", "trial_seconds=1"]
    found = document("compile", DIGITS, "-o", out, *auto)
    (chosen,) = [row for row in found["candidates"]["rows"] if row["status"] == "chosen"]
    assert chosen["setup"]["target"] == found["target"]
    assert document("explain", out)["candidates"] == found["candidates"]
    text = invoke("compile", DIGITS, "-o", out, *auto).stdout
    assert "CHOSEN: most rows a second" in text
    late = document("compile", DIGITS, "-o", out, *auto, "--latency-budget-ms", "0.000001", code=3)
    assert late["error"]["type"] == "NoCandidate"
    surplus = document("compile", DIGITS, "-o", out, "--tolerance", "0.01", code=3)
    assert "belongs to the target 'auto'" in surplus["error"]["message"]
