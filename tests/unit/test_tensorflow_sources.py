"""TensorFlow sources: what is predicted equals what TensorFlow computes, under the signature's own names."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf2onnx")

import keras  # noqa: E402
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2  # noqa: E402

import accelrt  # noqa: E402
from accelrt import isolation  # noqa: E402
from accelrt.errors import IsolatedError, SourceError  # noqa: E402
from accelrt.sources import SourceRequest, open_source  # noqa: E402
from accelrt.sources.tensorflow import recognises, to_onnx  # noqa: E402

pytestmark = pytest.mark.tensorflow

RNG = np.random.default_rng(0)


def predict(model: Any, feeds: Mapping[str, Any], **arguments: Any) -> dict[str, np.ndarray]:
    with accelrt.load(accelrt.compile(model, backend="cpu/onnxruntime", cache=False, **arguments)) as session:
        return session.predict(feeds)


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> None:
    """Relative to the largest value of each output: 1e-4, and exactly for anything but floats."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        if value.dtype.kind == "f":
            error = np.abs(found[name] - value).max() / np.abs(value).max()
            assert error < 1e-4, f"{name}: {error}"
            print(f"{name}: {error:.1e}")
        else:
            np.testing.assert_array_equal(found[name], value)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def cnn() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, padding="same"),
            keras.layers.BatchNormalization(moving_mean_initializer="random_normal"),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.5),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5, activation="softmax"),
        ]
    )


@pytest.fixture(scope="module")
def two_inputs() -> Any:
    keras.utils.set_random_seed(0)
    image, ids = keras.Input((6,), name="image"), keras.Input((4,), name="ids", dtype="int64")
    hidden = keras.layers.Dense(8, activation="gelu")(image)
    words = keras.layers.LSTM(8)(keras.layers.Embedding(10, 8)(ids))
    return keras.Model([image, ids], {"score": keras.layers.Dense(3)(hidden + words), "hidden": hidden})


class Pair(tf.Module):
    """Two methods, a weight and a table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tf.Variable(floats(3, 2))
        words = tf.lookup.KeyValueTensorInitializer(["cat", "dog"], tf.constant([7, 9], tf.int64))
        self.table = tf.lookup.StaticHashTable(words, -1)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
    def scale(self, x: Any) -> Any:
        return {"y": x @ self.weight, "output_0": tf.nn.relu(x)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="word")])
    def look_up(self, word: Any) -> Any:
        return {"id": self.table.lookup(word)}


@pytest.fixture(scope="module")
def pair() -> Any:
    return Pair()


@pytest.fixture(scope="module")
def pair_folder(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair") / "model"
    tf.saved_model.save(pair, str(folder), signatures={"scale": pair.scale, "look_up": pair.look_up})
    return folder


@tf.function
def flow(x: Any, limit: Any) -> Any:
    if tf.reduce_sum(x) > 0:  # noqa: SIM108 - the statement is what is tested
        x = x + 1.0
    else:
        x = x - 1.0
    steps = tf.constant(0, tf.int64)
    while tf.reduce_sum(tf.abs(x)) < limit:
        x = x * 2.0
        steps += 1
    return {"scaled": x, "steps": steps}


# What is recognised


def test_live_objects_are_recognised(cnn: Any, pair: Any, pair_folder: Path) -> None:
    loaded = tf.saved_model.load(str(pair_folder))
    for model in (cnn, pair, pair.scale, pair.scale.get_concrete_function(), flow, loaded):
        assert recognises(model)
    for other in (tf.constant(1), np.zeros(2), None, "model", keras, tf):
        assert not recognises(other)


# Keras


def test_resnet_50() -> None:
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None, input_shape=(96, 96, 3), classifier_activation=None)
    image = floats(2, 96, 96, 3)
    found = predict(model, {"input": image})
    same(found, {"predictions": model(image, training=False)})


def test_a_keras_model_and_its_files(cnn: Any, tmp_path: Path) -> None:
    cnn.save(tmp_path / "cnn.keras")
    cnn.export(tmp_path / "cnn", verbose=False)
    for model, output in ((cnn, "output"), (tmp_path / "cnn.keras", "output"), (tmp_path / "cnn", "output_0")):
        artifact = accelrt.compile(model)
        with accelrt.load(artifact) as session:
            for batch in (1, 5):  # the batch stays open
                image = floats(batch, 8, 8, 3)
                same(session.predict(image), {output: cnn(image, training=False)})
    assert open_source(cnn, SourceRequest()).format == "tensorflow"
    assert str(accelrt.compile(cnn).signature).startswith("(input: float32[batch, 8, 8, 3])")


def test_inputs_and_outputs_keep_their_names_and_types(two_inputs: Any, tmp_path: Path) -> None:
    two_inputs.save(tmp_path / "two.keras")
    feeds = {"ids": RNG.integers(0, 10, (3, 4)), "image": floats(3, 6)}
    expected = two_inputs(feeds, training=False)
    for model in (two_inputs, tmp_path / "two.keras"):
        same(predict(model, feeds), {"score": expected["score"], "hidden": expected["hidden"]})
    names = {"input_names": ["a", "b"], "output_names": ["c", "d"]}
    found = predict(two_inputs, {"a": feeds["image"], "b": feeds["ids"]}, **names)
    same(found, {"c": expected["score"], "d": expected["hidden"]})
    chosen = {"input_names": {"i": "ids", "p": "image"}, "output_names": {"s": "score"}}
    found = predict(two_inputs, {"p": feeds["image"], "i": feeds["ids"]}, **chosen)
    same(found, {"s": expected["score"]})


def test_a_subclassed_model_takes_examples() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, features: Any) -> Any:
            return self.dense(features)

    model, x = Own(), floats(4, 3)
    same(predict(model, {"features": x}, example_inputs=(x,)), {"output": model(x)})
    with pytest.raises(SourceError, match=r"\(features\).*no example_inputs"):
        accelrt.compile(model)


def test_the_same_model_converts_to_the_same_graph(cnn: Any, tmp_path: Path) -> None:
    cnn.save(tmp_path / "cnn.keras")
    first, second = (open_source(tmp_path / "cnn.keras", SourceRequest()).graph for _ in range(2))
    assert first.proto.SerializeToString(deterministic=True) == second.proto.SerializeToString(deterministic=True)


def test_a_transformer_block_with_open_dimensions() -> None:
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32", name="ids")
    words = keras.layers.Embedding(50, 16)(ids)
    mixed = keras.layers.LayerNormalization()(keras.layers.MultiHeadAttention(2, 8)(words, words) + words)
    model = keras.Model(ids, {"out": keras.layers.Dense(16, activation="gelu")(mixed)})
    artifact = accelrt.compile(model)
    with accelrt.load(artifact) as session:
        for shape in ((1, 3), (2, 9)):
            tokens = RNG.integers(0, 50, shape).astype(np.int32)
            same(session.predict(tokens), {"out": model(tokens, training=False)["out"]})


def test_words_are_looked_up_in_a_keras_file(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((1,), dtype="string"), keras.layers.StringLookup(vocabulary=["cat", "dog"])])
    model.save(tmp_path / "words.keras")
    words = np.array([["dog"], ["emu"]], object)
    for source in (model, tmp_path / "words.keras"):
        same(predict(source, {"input": words}), {"output": model(tf.constant(words.astype(str)))})


# Functions


def test_control_flow_on_data_goes_both_ways() -> None:
    specs = (tf.TensorSpec([None, 4]), tf.TensorSpec([]))
    artifact = accelrt.compile(flow, example_inputs=specs)
    steps = set()
    with accelrt.load(artifact) as session:
        for sign in (1, -1):
            for limit in (1e-6, 50.0, 1e4):
                feeds = {"x": sign * np.full((2, 4), 0.7, np.float32), "limit": np.float32(limit)}
                expected = flow(tf.constant(feeds["x"]), tf.constant(feeds["limit"]))
                found = session.predict(feeds)
                same(found, {"scaled": expected["scaled"], "steps": expected["steps"]})
                steps.add(int(found["steps"]))
    assert len(steps) > 2


def test_a_function_without_a_signature_asks_for_examples() -> None:
    with pytest.raises(SourceError, match=r"\(x, limit\).*no example_inputs.*TensorSpec"):
        accelrt.compile(flow)


def test_nests_and_constants_of_a_function() -> None:
    @tf.function
    def nest(x: Any, more: Any, double: bool = False) -> Any:
        y = x * more["w"] + more["b"][0]
        return (y * 2 if double else y), x > 0

    x, w, b = floats(2, 3), floats(3), floats(1)
    more = {"w": w, "b": [b]}
    found = predict(nest, {"x": x, "more_w": w, "more_b_0": b}, example_inputs=(x, more, True))
    expected = nest(x, more, True)
    same(found, {"output_0": expected[0], "output_1": expected[1]})


def test_an_input_that_nothing_reads_is_still_taken() -> None:
    x = floats(2, 3)
    found = predict(tf.function(lambda x, spare: x + 1), {"x": x, "spare": x}, example_inputs=(x, x))
    same(found, {"output": x + 1})


def test_an_output_that_is_an_input_or_given_twice() -> None:
    x = floats(2, 3)
    found = predict(tf.function(lambda x: {"x": x, "a": x + 1, "b": x + 1}), {"x": x}, example_inputs=(x,))
    same(found, {"x_output": x, "a": x + 1, "b": x + 1})


# SavedModels


def test_a_saved_model_with_two_signatures(pair: Any, pair_folder: Path) -> None:
    x, word = floats(4, 3), np.array(["dog", "emu", "cat"], object)
    scaled, looked_up = pair.scale(x), pair.look_up(word)
    for model in (pair_folder, pair_folder / "saved_model.pb", pair, tf.saved_model.load(str(pair_folder))):
        found = predict(model, {"x": x}, options={"signature": "scale"})
        same({name: found[name] for name in sorted(found)}, {"output_0": scaled["output_0"], "y": scaled["y"]})
        same(predict(model, {"word": word}, options={"signature": "look_up"}), {"id": looked_up["id"]})


def test_a_signature_is_asked_for_by_name(pair_folder: Path, pair: Any) -> None:
    with pytest.raises(SourceError, match=r"several signatures and no serving_default; there are look_up, scale"):
        accelrt.compile(pair_folder)
    with pytest.raises(SourceError, match=r"no signature 'serve'; there are look_up, scale"):
        accelrt.compile(pair_folder, options={"signature": "serve"})
    with pytest.raises(SourceError, match=r"no tf\.function 'serve'; its functions are: look_up, scale"):
        accelrt.compile(pair, options={"signature": "serve"})
    with pytest.raises(SourceError, match="has no signatures"):
        accelrt.compile(flow, options={"signature": "serve"})


def test_names_that_are_not_there(pair_folder: Path) -> None:
    chosen = {"options": {"signature": "scale"}}
    with pytest.raises(SourceError, match="has no input 'z'; its inputs are x"):
        accelrt.compile(pair_folder, input_names={"a": "z"}, **chosen)
    with pytest.raises(SourceError, match="lack x"):
        accelrt.compile(pair_folder, input_names={}, **chosen)
    with pytest.raises(SourceError, match="2 input names"):
        accelrt.compile(pair_folder, input_names=["a", "b"], **chosen)


def test_weights_beyond_a_protocol_buffer_lie_beside_the_graph(
    cnn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = isolation.call
    monkeypatch.setattr(isolation, "call", lambda name, **given: call(name, **given, large_bytes=0))
    cnn.save(tmp_path / "cnn.keras")
    model = to_onnx(tmp_path / "cnn.keras", SourceRequest())
    monkeypatch.undo()
    image = floats(2, 8, 8, 3)
    same(predict(model, {"input": image}), {"output": cnn(image, training=False)})


def test_a_saved_model_of_tensorflow_1(tmp_path: Path) -> None:
    v1, folder, weight = tf.compat.v1, str(tmp_path / "model"), floats(3, 2)
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        a = v1.placeholder(tf.float32, [None, 3], "a")
        product = tf.matmul(a, v1.get_variable("w", initializer=weight))
        result = tf.cond(tf.reduce_sum(a) > 0, lambda: product + 1, lambda: product - 1)
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, folder, {"a": a}, {"r": result})
    x = np.abs(floats(2, 3))
    for sign in (1, -1):
        same(predict(folder, {"a": sign * x}), {"r": sign * x @ weight + np.float32(sign)})


# Frozen graphs


@pytest.fixture(scope="module")
def frozen(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    function = convert_variables_to_constants_v2(pair.scale.get_concrete_function())
    path = tmp_path_factory.mktemp("frozen") / "scale.pb"
    path.write_bytes(function.graph.as_graph_def().SerializeToString())
    assert [tensor.name for tensor in function.inputs] == ["x:0"]
    return path


def test_a_frozen_graph_by_alias_by_tensor_and_by_itself(frozen: Path, pair: Any) -> None:
    x = floats(4, 3)
    expected = pair.scale(x)
    aliases = {"input_names": {"features": "x:0"}, "output_names": {"product": "matmul:0", "positive": "Relu"}}
    same(predict(frozen, {"features": x}, **aliases), {"product": expected["y"], "positive": expected["output_0"]})
    tensors = {"input_names": ["x:0"], "output_names": ["matmul:0"]}
    same(predict(frozen, {"x": x}, **tensors), {"matmul": expected["y"]})
    assert len(predict(frozen, {"x": x})) == 2
    inner = {"input_names": {"m": "matmul:0"}, "output_names": {"out": "matmul:0"}}
    same(predict(frozen, {"m": x[:, :2]}, **inner), {"out": x[:, :2]})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"input_names": ["y:0"]}, r"no tensor 'y:0', which is asked for as an input.*inputs are x:0"),
        ({"output_names": {"a": "matmull:0"}}, r"no tensor 'matmull:0'.*Did you mean 'matmul:0'"),
        ({"input_names": {"m": "Relu:0"}, "output_names": {"out": "matmul:0"}}, "depend on x, which the input names"),
        ({"input_names": ["x:0", "x"]}, "'x' is given twice"),
    ],
)
def test_wrong_tensors_of_a_frozen_graph(frozen: Path, names: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        accelrt.compile(frozen, **names)


def test_a_graph_that_is_not_frozen(pair: Any, tmp_path: Path) -> None:
    with tf.Graph().as_default() as graph:
        tf.compat.v1.placeholder(tf.float32, [2], "x") + tf.compat.v1.get_variable("w", [2], use_resource=False)
    (tmp_path / "graph.pb").write_bytes(graph.as_graph_def().SerializeToString())
    with pytest.raises(SourceError, match="not frozen: it has the variables w"):
        accelrt.compile(tmp_path / "graph.pb")


# What goes wrong


def test_operators_without_a_form_in_onnx_are_named() -> None:
    x = floats(3, 3)
    with pytest.raises(SourceError, match=r"tf2onnx cannot write as ONNX: Svd\."):
        accelrt.compile(tf.function(lambda x: tf.linalg.svd(x)[0]), example_inputs=(x,), fallback="error")


def test_a_comparison_of_strings_is_refused_before_it_runs() -> None:
    with pytest.raises(SourceError, match="Equal of strings"):
        accelrt.compile(tf.function(lambda x: x == "cat"), example_inputs=(np.array(["dog"]),), fallback="error")


def test_a_fault_in_the_model_is_told_with_its_cause() -> None:
    @tf.function
    def wrong(x: Any) -> Any:
        return tf.matmul(x, tf.zeros([5, 5]))

    with pytest.raises(SourceError, match=r"cannot be traced: ValueError: Dimensions must be equal, but are 3 and 5"):
        accelrt.compile(wrong, example_inputs=(floats(2, 3),))
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1]), -1)
    with pytest.raises(SourceError, match=r"untracked.*method of a tf\.Module"):
        accelrt.compile(tf.function(lambda x: table.lookup(x)), example_inputs=(np.array(["a"]),))


def test_a_lambda_layer_in_a_file_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"lambda x: (__import__('pathlib').Path({str(mark)!r}).touch(), x)[1]"
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(eval(code))])  # noqa: S307
    mark.unlink()  # it is live code: building the model ran it
    model.save(tmp_path / "model.keras")
    with pytest.raises(SourceError, match=r"Lambda layer, whose code would be run.*pass the keras\.Model"):
        accelrt.compile(tmp_path / "model.keras")
    assert not mark.exists()
    x = floats(3, 2)
    same(predict(model, {"input": x}), {"output": x})  # one's own model, in memory, may hold what it likes


@pytest.mark.parametrize("keep", [0, 10, 200, -50])
def test_truncated_models_are_errors_of_ours(
    tmp_path: Path, pair_folder: Path, frozen: Path, cnn: Any, keep: int
) -> None:
    shutil.copytree(pair_folder, tmp_path / "model")
    shutil.copy(frozen, tmp_path / "frozen.pb")
    cnn.save(tmp_path / "cnn.keras")
    for path in (tmp_path / "model" / "saved_model.pb", tmp_path / "frozen.pb", tmp_path / "cnn.keras"):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(SourceError):
            accelrt.compile(path.parent if path.name == "saved_model.pb" else path, options=None)


def test_a_saved_model_without_its_weights(tmp_path: Path, pair_folder: Path) -> None:
    shutil.copytree(pair_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "variables")
    with pytest.raises(SourceError, match="cannot be opened"):
        accelrt.compile(tmp_path / "model", options={"signature": "scale"})


def test_a_crash_of_the_child_leaves_this_process_alive(
    frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing_child.py").write_text("import os\ndef convert(**_):\n    os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("accelrt.sources.tensorflow._CHILD", "crashing_child")
    isolation._stop()  # the next child sees the path
    with pytest.raises(IsolatedError, match="SIGABRT"):
        accelrt.compile(frozen)
    monkeypatch.undo()
    assert accelrt.compile(frozen, cache=False).signature.input_names


def test_the_host_needs_no_tensorflow_for_files(frozen: Path) -> None:
    import subprocess

    code = "import accelrt, sys; accelrt.compile(sys.argv[1]); print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(frozen)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
