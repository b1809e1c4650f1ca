"""The examples that need nothing but accelrt run as they stand, and say what their text promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SAID = {
    "quickstart.py": ["448 of 450 digits right", "p50"],
    "swap_backends.py": ["ACCELRT_BACKEND=cpu/reference", "outputs agree"],
    "read_placement.py": ["As text:", "As data:", "4 nodes left toy/fake", 'With fallback="error":'],
    "choose_automatically.py": ["Candidates for least latency", "CHOSEN", "the first digit is a"],
    "precision_table.py": [
        "cpu/onnxruntime   fp32",
        "cpu/onnxruntime   int8",
        "Refused: cpu/onnxruntime in bf16: 10 of 10",
    ],
    "save_and_load.py": ["digits.accel in another process: the same scores", "sources=False"],
    "neuron/bert_core_groups.py": [
        "model 6: ",
        "neuron:7   group 0: session 1 (neuron/emulator)",
        "neuron:15  group 6: session 7 (neuron/emulator)",
        "7 models answered 8 calls each at the same time, all as on the CPU",
        "nothing about the speed",
    ],
    "neuron/feed_sixteen_cores.py": [
        "neuron:15",
        "480 answers, in order, the same both ways",
        "nothing about the speed",
    ],
    "neuron/resnet50_settings.py": [
        "175 nodes on neuron/emulator (emulated)",
        "the same class for 10 of 10",
        "outputs agree",
        "nothing about the speed",
    ],
}
SLOW = {"neuron/resnet50_settings.py"}
"""Those that take more than a few seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.suite) if name in SLOW else name for name in SAID]
)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for words in SAID[name]:
        assert words in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


NEURON = {
    "inf2_resnet.py": ("inf2.xlarge", "torch", ["one core agrees with PyTorch: True", "cores [0, 1]",
                       "batch agrees with PyTorch: True"]),
    "inf1_groups.py": ("inf1.xlarge", "torch", ["animals: 10 classes, agrees with PyTorch: True", "any batch: (5, 10)",
                       "flowers: 20 classes, agrees with PyTorch: True"]),
    "bert_pairs.py": ("inf2.xlarge", "torch", ["near: agrees with PyTorch: True, the same class: True",
                      "far: agrees with PyTorch: True, the same class: True", "received 2 16, expected 1 16"]),
    "tensorflow_trace.py": ("inf1.xlarge", "tensorflow", ["trace agrees with TensorFlow: True",
                            "batch of 7 agrees with TensorFlow: True"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NEURON)
def test_script_for_neuron_runs_on_the_emulator(name: str, tmp_path: Path) -> None:
    instance, framework, words = NEURON[name]
    pytest.importorskip(framework)
    emulated = {"ACCELRT_BACKEND": "neuron/emulator", "ACCELRT_NEURON_EMULATE": instance}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "neuron" / name],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path, env={**os.environ, **emulated},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in words:
        assert text in done.stdout


EIA = {
    "detect_objects.py": ("tensorflow", ["boxes right in 40 of 40 frames", "boxes agree: True", "frame 0: square"]),
    "pytorch_1_3.py": ("torch", ["call 2:", "agrees with PyTorch: True"]),
    "pytorch_1_5.py": ("torch", ["6 words:", "11 words:", "agrees with PyTorch: True"]),
    "keras_predict.py": ("tensorflow", ["in batches of 8", "agrees with Keras: True", "the same class for 50 of 50"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.suite) if name == "keras_predict.py" else name for name in EIA]
)
def test_script_for_elastic_inference_runs_on_the_cpu(name: str, tmp_path: Path) -> None:
    framework, words = EIA[name]
    pytest.importorskip(framework)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "eia" / name],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for text in words:
        assert text in done.stdout
    if name == "detect_objects.py":
        assert done.stdout.count("boxes right in 40 of 40 frames") == 2, "with and without the accelerator"


@pytest.mark.suite
@pytest.mark.parametrize("name", EIA)
def test_script_for_elastic_inference_runs_on_a_slice(name: str, tmp_path: Path) -> None:
    framework, words = EIA[name]
    pytest.importorskip(framework)
    pytest.importorskip("grpc")
    from tests.contract.lenders import lender, state_of

    with lender("--accelerator", "cpu:0", "--size", "eia2.medium", "--slices", "1") as server:
        done = subprocess.run(
            [sys.executable, EXAMPLES / "eia" / name],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=tmp_path,
            env={**os.environ, "ACCELRT_BACKEND": "eia/remote", "ACCELRT_EIA_ACCELERATORS": server.url},
        )
        assert done.returncode == 0, done.stderr
        for text in words:
            assert text in done.stdout
        if name == "detect_objects.py":
            assert "use_ei=True (eia/remote)" in done.stdout
        watcher = server.client()
        statistics = watcher.ask("ServerMetadata", 10)
        assert statistics.name == "accelrt"
        assert len(state_of(watcher).holders) <= 1
    assert "fell" not in done.stderr and "cannot be reached" not in done.stderr, done.stderr


def _needs_serve() -> None:
    from accelrt.cli import app

    if "serve" not in {command.name for command in app.registered_commands}:
        pytest.skip("this accelrt has no `accelrt serve`")


def test_a_client_of_the_server_classifies_images(tmp_path: Path) -> None:
    _needs_serve()
    pytest.importorskip("tritonclient.http")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "serving" / "classify_images.py"],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "takes image FP32" in done.stdout and "right for 8 of 8 images" in done.stdout


def test_a_client_and_a_server_in_two_network_namespaces(tmp_path: Path) -> None:
    _needs_serve()
    done = subprocess.run(
        [sys.executable, EXAMPLES / "eia" / "two_namespaces.py"],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    assert "eia:0" in done.stdout and "of 100" in done.stdout and "ended with code 0" in done.stdout


def test_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {
        path.relative_to(EXAMPLES).as_posix()
        for pattern in ("*.py", "neuron/*.py", "eia/*.py", "serving/*.py")
        for path in EXAMPLES.glob(pattern)
    }
    present = scripts | {"plugin/"}
    assert all(f"]({name})" in text for name in present)
    assert set(SAID) <= scripts
