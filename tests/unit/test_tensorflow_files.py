"""TensorFlow files told by their content, and Keras files that are refused, without TensorFlow."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from accelrt.errors import OptionError, SourceError
from accelrt.sources import SourceOptions, SourceRequest, open_source
from accelrt.sources.tensorflow_files import recognises_file, vet_keras
from accelrt.testing import models


def text(field: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([field << 3 | 2, len(content)]) + content


GRAPH_DEF = text(1, text(1, b"x") + text(2, b"Placeholder")) + text(1, text(1, b"y") + text(2, b"Identity"))


def keras_file(path: Path, config: Any, weights: bytes | None = b"\x89HDF\r\n\x1a\n") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        if weights is not None:
            archive.writestr("model.weights.h5", weights)
    return path


def layer(name: str, module: str | None = "keras.layers", **more: Any) -> dict[str, Any]:
    inner = {"module": module, "class_name": name, "config": {}, "registered_name": None, **more}
    return {"module": "keras", "class_name": "Sequential", "config": {"layers": [inner]}, "registered_name": None}


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("frozen.pb", GRAPH_DEF, "graph-def"),
        ("of_any_name", GRAPH_DEF, "graph-def"),
        ("model.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(8), "tflite"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(8), "keras-h5"),
        ("saved_model.pb", b"\x08\x01\x12\x00", "saved-model"),
        ("model.pb", b"\x08\x01\x12\x00", None),
        ("empty", b"", None),
        ("text.pb", b"node { name: 'x' }", None),
        ("cut.pb", GRAPH_DEF[:3], None),
        ("endless.pb", b"\x0a\xff\xff\xff\xff\xff\xff\xff", None),
    ],
)
def test_a_file_is_told_by_its_content(tmp_path: Path, name: str, content: bytes, kind: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert recognises_file(path) == kind


def test_a_folder_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    assert recognises_file(tmp_path) is None
    assert recognises_file(tmp_path / "missing") is None
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert recognises_file(tmp_path) == "saved-model"


def test_onnx_is_not_taken_for_a_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.pb"
    onnx.save(models.mlp(), path)
    assert recognises_file(path) is None
    assert open_source(path, SourceRequest()).format == "onnx"
    # A tensor, as ONNX's own tests keep them in .pb files, is no model of either.
    path.write_bytes(helper.make_tensor("x", TensorProto.FLOAT, [2], [1.0, 2.0]).SerializeToString())
    assert recognises_file(path) is None


def test_a_keras_file_is_told_from_other_zips(tmp_path: Path) -> None:
    assert recognises_file(keras_file(tmp_path / "m.keras", layer("Dense"))) == "keras"
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("a.txt", "")
    assert recognises_file(tmp_path / "other.keras") is None


def test_a_harmless_keras_file_passes(tmp_path: Path) -> None:
    function = {"module": "keras.activations", "class_name": "function", "config": "relu", "registered_name": "relu"}
    vet_keras(keras_file(tmp_path / "m.keras", layer("Dense", activation=function)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (layer("Lambda"), "Lambda layer.*pass the keras.Model"),
        (
            layer("Dense", activation={"class_name": "__lambda__", "config": {"value": "..."}}),
            "Python function as code",
        ),
        (layer("Dense", activation={"class_name": "Lambda", "module": None}), "Lambda layer"),
        (layer("layers.Lambda", "keras"), "Lambda layer"),
        (layer("Dense", registered_name="keras>Lambda"), "Lambda layer"),
        (layer("utils.get_file", "keras"), "not part of Keras"),
        (layer("TorchModuleWrapper"), "PyTorch pickle"),
        (layer("TFSMLayer"), "another model"),
        (layer("system", "os"), "the module os, which is not part of Keras"),
        (layer("X", "keras_evil.layers"), "not part of Keras"),
        (
            layer("Dense", activation={"class_name": "function", "module": "keras.utils", "config": "get_file"}),
            "get_file",
        ),
        (layer("D", a={"class_name": "function", "module": "keras.src.utils.file_utils", "config": "g"}), "would call"),
        (layer("Mine", None, registered_name="my_package>Mine"), "my_package>Mine, a class"),
        ("{", "no Keras file that can be read"),
        ("[" * 100_000, "no Keras file that can be read"),
    ],
)
def test_a_keras_file_that_reaches_out_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    path = keras_file(tmp_path / "m.keras", config)
    with pytest.raises(SourceError, match=message):
        vet_keras(path)
    with pytest.raises(SourceError, match=message):
        open_source(path, SourceRequest())


def test_a_keras_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no weights"):
        vet_keras(keras_file(tmp_path / "m.keras", layer("Dense"), None))
    path = keras_file(tmp_path / "damaged.keras", layer("Dense"), b"weights" * 100)
    path.write_bytes(path.read_bytes().replace(b"weightsweights", b"weightsWEIGHTS", 1))
    with pytest.raises(SourceError, match="damaged"):
        vet_keras(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SourceError, match="not a TensorFlow model"):
        open_source(path, SourceRequest())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(8), "TensorFlow Lite.*Accepted: a SavedModel folder"),
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(8), r"may hold code.*model\.keras"),
        ("m.h5", b"", "not a TensorFlow model"),
    ],
)
def test_what_is_not_taken_says_what_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name, SourceRequest())


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"without a saved_model\.pb.*SavedModel folder"):
        open_source(tmp_path, SourceRequest())


def test_options_of_tensorflow_are_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="signature"):
        open_source(models.mlp(), SourceRequest(options=SourceOptions(signature="serve")))
    with pytest.raises(SourceError, match=r"input_names is a mapping.*input_names=\['x'\]"):
        open_source(models.mlp(), SourceRequest(input_names={"x": "input:0"}))
    (tmp_path / "frozen.pb").write_bytes(GRAPH_DEF)
    with pytest.raises(OptionError, match="has no signatures"):
        open_source(tmp_path / "frozen.pb", SourceRequest(options=SourceOptions(signature="serve")))
    with pytest.raises(OptionError, match="dynamic_shapes"):
        open_source(tmp_path / "frozen.pb", SourceRequest(options=SourceOptions(dynamic_shapes={"x": {0: "n"}})))


@pytest.mark.parametrize("package", ["tensorflow", "tf2onnx"])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "frozen.pb").write_bytes(GRAPH_DEF)
    monkeypatch.setattr("accelrt.sources.tensorflow.is_installed", lambda asked, package=package: asked != package)
    with pytest.raises(SourceError, match=rf"needs {package}.*pip install 'accelrt\[tensorflow\]'"):
        open_source(tmp_path / "frozen.pb", SourceRequest())
