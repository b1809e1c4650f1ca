"""TensorFlow scripts for Inf1: `tfn.trace` of TensorFlow 2, and `tfn.saved_model.compile` of TensorFlow 1.

ACCELRT_BACKEND=neuron/emulator python examples/neuron/tensorflow_trace.py
"""

import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

import accelrt.compat.neuron.tensorflow_neuron as tfn

tf.keras.utils.set_random_seed(0)
model = tf.keras.Sequential(
    [
        tf.keras.Input((16, 16, 3)),
        tf.keras.layers.Conv2D(8, 3, activation="relu"),
        tf.keras.layers.GlobalAveragePooling2D(),
        tf.keras.layers.Dense(5),
    ]
)
example = tf.constant(np.random.default_rng(0).random((4, 16, 16, 3), np.float32))


def agrees(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-2)


neuron = tfn.trace(model, example)
print(f"{neuron.on_neuron_ratio:.0%} of the operators on the device")
with tempfile.TemporaryDirectory() as folder:
    neuron.save(Path(folder) / "traced")
    restored = tfn.load_model(Path(folder) / "traced")
    print("trace agrees with TensorFlow:", agrees(restored(example).numpy(), model(example).numpy()))

    model.export(Path(folder) / "saved", verbose=False)
    ratio = tfn.saved_model.compile(
        Path(folder) / "saved", Path(folder) / "compiled", batch_size=2, dynamic_batch_size=True
    )["OnNeuronRatio"]
    print(f"saved_model.compile: {ratio:.0%}")
    predict = tfn.predictor.from_saved_model(Path(folder) / "compiled")
    signature = tf.saved_model.load(str(Path(folder) / "saved")).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    images = np.random.default_rng(1).random((7, 16, 16, 3), np.float32)
    (scores,) = predict({name: images}).values()
    print("a batch of", len(scores), "agrees with TensorFlow:", agrees(scores, model(images).numpy()))
