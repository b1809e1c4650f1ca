"""The digits that travel with the package: what `digits_facts` says is what the files do."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from accelrt.data import digits_facts, digits_model, held_out_digits
from accelrt.testing.models import parameter_count


def test_held_out_images_are_as_described() -> None:
    images, labels = held_out_digits()
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert images.shape == (digits_facts().held_out, 1, 8, 8)
    assert labels.shape == images.shape[:1]
    assert images.min() == 0
    assert images.max() == 1
    # Sixteenths, exactly: nothing was lost on the way into the file.
    np.testing.assert_array_equal(images * 16, np.round(images * 16))
    # Stratified: every digit is there about as often as every other.
    counts = np.bincount(labels, minlength=10)
    assert counts.max() - counts.min() <= 3


def test_held_out_images_are_scikit_learns_and_a_quarter() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    facts = digits_facts()
    assert facts.held_out + facts.trained_on == len(digits.target)
    known = {image.tobytes(): label for image, label in zip(digits.images / 16, digits.target, strict=True)}
    for image, label in zip(*held_out_digits(), strict=True):
        assert known[image.astype(np.float64).tobytes()] == label


def test_model_is_small_self_contained_and_free_in_batch() -> None:
    path = digits_model()
    assert path.stat().st_size < 300_000
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(weight.external_data for weight in model.graph.initializer)
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Dropout", "BatchNormalization"})
    (image,), (scores,) = model.graph.input, model.graph.output
    assert (image.name, scores.name) == ("image", "scores")
    sizes = [[dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in (image, scores)]
    assert sizes == [["batch", 1, 8, 8], ["batch", 10]]
    assert parameter_count(model) == digits_facts().parameters


def test_model_says_nothing_about_the_machine_that_made_it() -> None:
    assert b"/work/" not in digits_model().read_bytes()
    assert b".py" not in digits_model().read_bytes()


def test_accuracy_is_the_one_written_down() -> None:
    session = onnxruntime.InferenceSession(digits_model(), providers=["CPUExecutionProvider"])
    images, labels = held_out_digits()
    (scores,) = session.run(["scores"], {"image": images})
    facts = digits_facts()
    assert int((scores.argmax(axis=1) == labels).sum()) == facts.correct
    assert facts.accuracy == facts.correct / facts.held_out
    assert facts.accuracy >= 0.985
    (one,) = session.run(["scores"], {"image": images[:1]})
    np.testing.assert_allclose(one, scores[:1], rtol=1e-4, atol=1e-4)


def test_facts_name_seed_epochs_versions_and_source() -> None:
    facts = digits_facts()
    assert facts.epochs > 0
    assert facts.seed >= 0
    assert {"torch", "onnx", "onnxruntime", "scikit-learn", "numpy", "python"} <= set(facts.versions)
    assert "10.24432/C50P49" in facts.source
    assert facts.licence == "CC BY 4.0"
