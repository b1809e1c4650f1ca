"""A Keras script for Elastic Inference: `EIKerasModel` in place of the model, and its `predict`.

`from ei_for_tf.python.keras.ei_keras import EIKerasModel` is the one line that was changed.

    ACCELRT_BACKEND=cpu/openvino python examples/eia/keras_predict.py
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from accelrt.compat.eia import EIKerasModel

tf.keras.utils.set_random_seed(0)
model = tf.keras.Sequential(
    [
        tf.keras.Input((32, 32, 3)),
        tf.keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
        tf.keras.layers.BatchNormalization(),
        tf.keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
        tf.keras.layers.GlobalAveragePooling2D(),
        tf.keras.layers.Dense(10, activation="softmax"),
    ]
)
images = np.random.default_rng(0).random((50, 32, 32, 3), np.float32)

ei_model = EIKerasModel(model)
for attempt in range(3):
    start = time.perf_counter()
    predictions = ei_model.predict(images, batch_size=8)
    print(f"call {attempt}: {time.perf_counter() - start:.4f} s for {len(predictions)} images in batches of 8")
expected = model.predict(images, batch_size=8, verbose=0)
print("agrees with Keras:", bool(np.allclose(predictions, expected, rtol=1e-3, atol=1e-5)))
print("the same class for", int((predictions.argmax(1) == expected.argmax(1)).sum()), "of", len(images))
