"""TensorFlow models that run whole on cpu/tensorflow: because they do not convert, or because the engine was named."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import accelrt  # noqa: E402
from accelrt.errors import CompileError, ConversionError, IncompatibleProgram, OptionError, SourceError  # noqa: E402
from accelrt.sources import SourceOptions, SourceRequest, open_source, open_whole, whole_source  # noqa: E402

pytestmark = [pytest.mark.tensorflow]


class Shop(tf.Module):  # type: ignore[misc]
    """``total`` has an operator that tf2onnx lacks, ``price`` a table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tf.Variable([[1.0], [2.0]])
        words = tf.lookup.KeyValueTensorInitializer(["tea", "milk"], tf.constant([3, 5], tf.int64))
        self.prices = tf.lookup.StaticHashTable(words, -1)

    @tf.function(
        input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x"), tf.TensorSpec([None, 2], tf.float32, name="a")]
    )
    def total(self, x: Any, a: Any) -> Any:
        odds = tf.math.betainc(tf.sigmoid(x), tf.sigmoid(x), tf.sigmoid(a))
        return {"sum": odds @ self.weight, "difference": x - a}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="word")])
    def price(self, word: Any) -> Any:
        return {"price": self.prices.lookup(word), "upper": tf.strings.upper(word)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCELRT_BACKEND", raising=False)
    monkeypatch.delenv("ACCELRT_TRUST", raising=False)


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop()


@pytest.fixture(scope="module")
def folder(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop")
    tf.saved_model.save(shop, str(path), signatures={"total": shop.total, "price": shop.price})
    return path


def halves(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_what_does_not_convert_runs_whole_and_says_so_once(
    shop: Shop, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConversionError, match="Betainc"):
        open_source(folder, SourceRequest(options=SourceOptions(signature="total")))
    with caplog.at_level(logging.WARNING, "accelrt"):
        artifact = accelrt.compile(folder, options={"signature": "total"})
    (record,) = (record for record in caplog.records if record.name == "accelrt")
    assert "ran whole on cpu/tensorflow" in record.getMessage()
    assert "Betainc" in record.getMessage()
    text = " ".join(artifact.explain().split())
    assert "runs whole on cpu/tensorflow, because it cannot be converted to ONNX" in text
    assert "Betainc" in text
    assert artifact.placement.segments[0].weight_bytes == 8
    with accelrt.load(artifact) as session:
        for rows in (1, 5):
            x, a = halves(rows, 2), halves(rows, 2, seed=1)
            found, expected = session.predict({"x": x, "a": a}), shop.total(x, a)
            assert set(found) == {"sum", "difference"}
            for name, value in found.items():
                np.testing.assert_allclose(value, expected[name], rtol=1e-6)


def test_the_policy_and_the_target_may_forbid_it(folder: Path) -> None:
    for target, fallback in (("cpu", "error"), ("cpu/reference", "warn")):
        with pytest.raises(ConversionError, match="Betainc"):
            accelrt.compile(folder, target, fallback=fallback, options={"signature": "total"})


def test_text_goes_in_and_out(folder: Path) -> None:
    artifact = accelrt.compile(folder, "cpu/tensorflow", options={"signature": "price"})
    with accelrt.load(artifact) as session:
        found = session.predict(np.array(["milk", "süß", ""], object))
        assert found["price"].tolist() == [5, -1, -1]
        assert found["upper"].tolist() == ["MILK", "Süß", ""]
        assert found["upper"].dtype == object
        empty = session.predict(np.array([], object))
        assert empty["upper"].shape == empty["price"].shape == (0,)


def test_names_and_dimensions_are_those_of_the_converted_graph(shop: Shop, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((4,), name="image")
    model = keras.Model(image, {"scores": keras.layers.Dense(3)(image), "image": image})
    model.save(tmp_path / "model.keras")
    function = tf.function(lambda left, right: (left @ right, {"left": left}))
    specs = (tf.TensorSpec([None, 2], tf.float32), tf.TensorSpec([2, 3], tf.float32))
    tf.saved_model.save(
        tf.Module(),
        str(tmp_path / "saved"),
        signatures={"only": tf.function(lambda x: {"y": x + 1}).get_concrete_function(specs[0])},
    )
    for source, examples, asked in (
        (model, None, {}),
        (tmp_path / "model.keras", None, {}),
        (function, specs, {}),
        (tmp_path / "saved", None, {"input_names": {"in": "x"}, "output_names": ["out"]}),
    ):
        converted = open_source(source, SourceRequest(examples, **asked)).graph.signature
        artifact = accelrt.compile(source, "cpu/tensorflow", example_inputs=examples, **asked)
        assert artifact.signature == converted
        with accelrt.load(artifact) as session:
            inputs = {
                port.name: halves(*(d if isinstance(d, int) else 2 for d in port.type.shape))
                for port in converted.inputs
            }  # type: ignore[union-attr]
            found = session.predict(inputs)
            with (
                accelrt.load(source, example_inputs=examples)
                if not asked
                else accelrt.load(accelrt.compile(source, **asked)) as oracle
            ):
                expected = oracle.predict(inputs)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_frozen_graph_runs_whole_between_the_tensors_named(shop: Shop, tmp_path: Path) -> None:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    frozen = convert_variables_to_constants_v2(shop.total.get_concrete_function())
    (tmp_path / "total.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    artifact = accelrt.compile(tmp_path / "total.pb", fallback="allow", input_names={"first": "x:0", "second": "a:0"})
    assert artifact.placement.whole is not None
    assert artifact.signature.input_names == ("first", "second")
    x, a = halves(3, 2), halves(3, 2, seed=1)
    with accelrt.load(artifact) as session:
        found = list(session.predict({"first": x, "second": a}).values())
    expected = shop.total(x, a)
    for value in (expected["sum"].numpy(), expected["difference"].numpy()):
        assert any(value.shape == each.shape and np.allclose(value, each, rtol=1e-6) for each in found)


def test_outputs_that_are_left_out_are_not_returned(folder: Path) -> None:
    artifact = accelrt.compile(
        folder, "cpu/tensorflow", options={"signature": "total"}, output_names={"d": "difference"}
    )
    with accelrt.load(artifact) as session:
        x, a = halves(3, 2), halves(3, 2, seed=1)
        found = session.predict({"x": x, "a": a})
    assert list(found) == ["d"]
    np.testing.assert_array_equal(found["d"], x - a)


def test_refusals_are_typed(folder: Path) -> None:
    with pytest.raises(SourceError, match="several signatures"):
        accelrt.compile(folder, "cpu/tensorflow")
    with pytest.raises(CompileError, match="fp32, not in bf16"):
        accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total"}, precision="bf16")
    with pytest.raises(SourceError, match=r"cpu/torch takes sources whole.*this one is saved_model"):
        accelrt.compile(folder, "cpu/torch")
    with pytest.raises(OptionError, match="opset"):
        accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total", "opset": 15})
    artifact = accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total", "threads": 3})
    with pytest.raises(OptionError, match="once a process"):
        accelrt.load(artifact)


def test_threads_are_set_where_tensorflow_has_not_begun(folder: Path, tmp_path: Path) -> None:
    path = accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total", "threads": 3}).save(
        tmp_path / "shop.accel"
    )
    code = (
        "import accelrt, sys; s = accelrt.load(sys.argv[1], trust=True); import tensorflow as tf;"
        "print(tf.config.threading.get_intra_op_parallelism_threads(), s.stats().engines)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3 ('cpu/tensorflow',)"


def test_equal_folders_are_equal_files_and_are_found_again(folder: Path, tmp_path: Path) -> None:
    request = SourceRequest(options=SourceOptions(signature="total"))
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        source = whole_source(folder, request)
        assert source is not None
        written = source.write(tmp_path / name)
        assert open_whole(tmp_path / name) == written
        digests.append(written.digest)
    assert digests[0] == digests[1]
    first, second = (accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total"}) for _ in range(2))
    assert first.folder == second.folder


def test_the_folder_of_a_loaded_model_goes_when_it_is_closed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    artifact = accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total"})
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with accelrt.load(artifact):
        assert [path.name.startswith("accelrt-savedmodel-") for path in scratch.iterdir()] == [True]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt"])
def test_an_archive_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    from accelrt_cpu.tensorflow_runtime import open_saved_model

    with zipfile.ZipFile(tmp_path / "saved_model.zip", "w") as archive:
        archive.writestr("accelrt.json", "{}")
        archive.writestr(name, "hello")
    with pytest.raises(CompileError, match="outside its folder"):
        open_saved_model(tmp_path / "saved_model.zip")
    assert not (tmp_path / "outside.txt").exists()


def test_a_damaged_program_does_not_fit(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from accelrt.artifact.store import program_files
    from accelrt.backend import Program
    from accelrt_cpu.tensorflow import TensorFlowEngine, TensorFlowOptions

    artifact = accelrt.compile(folder, "cpu/tensorflow", options={"signature": "total"})
    files = program_files(artifact.folder, artifact.manifest.segments[0])
    program = Program(files, {}, artifact.signature, TensorFlowOptions())
    (tmp_path / "saved_model.zip").write_bytes(files["saved_model.zip"].read_bytes()[:2000])
    with pytest.raises(IncompatibleProgram, match="cannot be opened"):
        TensorFlowEngine().load(replace(program, files={"saved_model.zip": tmp_path / "saved_model.zip"}), ())
