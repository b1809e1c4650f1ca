"""Objects in a video, frame by frame through `EIPredictor`, with and without the accelerator.

The script is one for Elastic Inference: `from ei_for_tf.python.predictor.ei_predictor import EIPredictor` is the one
line that was changed. The detector is trained here in seconds, on frames drawn at random: squares and discs on noise.

    ACCELRT_BACKEND=cpu/openvino python examples/eia/detect_objects.py
"""

import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from accelrt.compat.eia import EIPredictor

SIZE, STRIDE, FRAMES, STEPS, BATCH = 64, 8, 40, 240, 32
GRID = SIZE // STRIDE
NAMES = ("square", "disc")


def draw(objects, rng):
    """Draw a frame of uint8 [SIZE, SIZE, 3]; an object is its class, its centre (y, x) and its radius, in pixels."""
    frame = rng.integers(0, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    ys, xs = np.mgrid[:SIZE, :SIZE]
    for kind, y, x, radius in objects:
        dy, dx = np.abs(ys - y), np.abs(xs - x)
        inside = (np.maximum(dy, dx) if kind == 0 else np.hypot(dy, dx)) <= radius
        frame[inside] = (230, 60, 60) if kind == 0 else (60, 220, 80)
    return frame


def box_of(kind, y, x, radius):
    """Return ymin, xmin, ymax, xmax as shares of the frame."""
    return np.clip(np.array([y - radius, x - radius, y + radius, x + radius]) / SIZE, 0, 1)


def scene(rng):
    """Return two objects, one of each kind, that do not touch."""
    while True:
        objects = [(kind, *rng.uniform(10, SIZE - 10, 2), rng.uniform(5, 10)) for kind in (0, 1)]
        (_, y0, x0, r0), (_, y1, x1, r1) = objects
        if max(abs(y0 - y1), abs(x0 - x1)) > r0 + r1 + STRIDE:
            return objects


def example(rng):
    """Return a frame and what the detector is to say of each cell: is it a centre, of what, and where exactly."""
    objects, target = scene(rng), np.zeros((GRID, GRID, 6), np.float32)
    for kind, y, x, radius in objects:
        row, column = int(y // STRIDE), int(x // STRIDE)
        target[row, column] = 1, kind, y / STRIDE - row, x / STRIDE - column, radius / STRIDE, radius / STRIDE
    return draw(objects, rng), target


def network():
    keras = tf.keras
    layers = [keras.Input((SIZE, SIZE, 3))]
    for filters in (8, 16, 24):
        layers.append(keras.layers.Conv2D(filters, 3, 2, "same", activation="relu"))
    layers += [keras.layers.Conv2D(32, 3, 1, "same", activation="relu"), keras.layers.Conv2D(6, 1)]
    return keras.Sequential(layers)


def train(model):
    rng, optimizer = np.random.default_rng(0), tf.keras.optimizers.Adam(4e-3)
    frames, targets = map(np.stack, zip(*(example(rng) for _ in range(24 * BATCH)), strict=True))

    weights = model.trainable_variables

    @tf.function
    def step(images, wanted):
        with tf.GradientTape() as tape:
            found = model(tf.cast(images, tf.float32) / 255.0, training=True)
            centre = wanted[..., 0]
            is_centre = tf.nn.weighted_cross_entropy_with_logits(centre, found[..., 0], 8.0)
            is_disc = centre * tf.nn.sigmoid_cross_entropy_with_logits(wanted[..., 1], found[..., 1])
            place = centre[..., None] * tf.abs(found[..., 2:] - wanted[..., 2:])
            loss = tf.reduce_mean(is_centre) + (tf.reduce_sum(is_disc) + tf.reduce_sum(place)) / (2.0 * BATCH)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    for index in range(STEPS):
        chosen = rng.integers(0, len(frames), BATCH)
        loss = step(frames[chosen], targets[chosen])
        if index == STEPS * 3 // 4:
            optimizer.learning_rate = 1e-3
    return float(loss)


class Detector(tf.Module):
    """From frames to boxes, by the names that TensorFlow's object detection models have for them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.uint8, name="inputs")])
    def detect(self, inputs):
        found = self.model(tf.cast(inputs, tf.float32) / 255.0, training=False)
        score = tf.sigmoid(found[..., :1])
        peak = score * tf.cast(score >= tf.nn.max_pool2d(score, 3, 1, "SAME"), tf.float32)
        best, where = tf.math.top_k(tf.reshape(peak, [-1, GRID * GRID]), 4)
        cells = tf.gather(tf.reshape(found, [-1, GRID * GRID, 6]), where, batch_dims=1)
        y = tf.cast(where // GRID, tf.float32) + cells[..., 2]
        x = tf.cast(where % GRID, tf.float32) + cells[..., 3]
        boxes = tf.stack([y - cells[..., 4], x - cells[..., 5], y + cells[..., 4], x + cells[..., 5]], axis=-1)
        return {
            "detection_boxes": tf.clip_by_value(boxes / GRID, 0.0, 1.0),
            "detection_scores": best,
            "detection_classes": tf.cast(cells[..., 1] > 0, tf.float32),
            "num_detections": tf.reduce_sum(tf.cast(best > 0.5, tf.float32), axis=1),
        }


def video():
    """Return frames, and the objects in each: one of each kind, on their ways."""
    rng = np.random.default_rng(7)
    clip = []
    for index in range(FRAMES):
        turn = 2 * np.pi * index / FRAMES
        objects = [
            (0, 16 + 4 * np.sin(turn), 14 + 36 * index / FRAMES, 7),
            (1, 46 + 6 * np.cos(turn), 50 - 36 * index / FRAMES, 8),
        ]
        clip.append((draw(objects, rng), objects))
    return clip


def overlap(one, other):
    """Return the area that two boxes share, as a share of what they cover together."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return shared / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def run(predictor, clip):
    """Return the detections of each frame and the seconds that each took."""
    results, seconds = [], []
    for frame, _ in clip:
        start = time.perf_counter()
        results.append(predictor({"inputs": np.expand_dims(frame, 0)}))
        seconds.append(time.perf_counter() - start)
    return results, seconds


def right(result, objects):
    """Tell whether exactly the objects of a frame were found, each where it is."""
    count = int(result["num_detections"][0])
    found = list(zip(result["detection_classes"][0][:count], result["detection_boxes"][0][:count], strict=True))
    return count == len(objects) and all(
        any(int(kind) == wanted[0] and overlap(box, box_of(*wanted)) > 0.5 for kind, box in found) for wanted in objects
    )


tf.keras.utils.set_random_seed(0)
model = network()
began = time.perf_counter()
print(f"trained for {STEPS} steps: loss {train(model):.3f}, {time.perf_counter() - began:.1f} s")
clip = video()
with tempfile.TemporaryDirectory() as folder:
    detector = Detector(model)
    tf.saved_model.save(detector, folder, signatures={"serving_default": detector.detect})
    answers = []
    for use_ei in (True, False):
        predictor = EIPredictor(model_dir=folder, use_ei=use_ei, accelerator_id=0)
        results, seconds = run(predictor, clip)
        where = os.environ.get("ACCELRT_BACKEND", "cpu") if use_ei else "cpu"
        print(
            f"use_ei={use_ei} ({where}): first frame {seconds[0]:.3f} s, the others "
            f"{statistics.median(seconds[1:]):.5f} s each, {FRAMES} frames {sum(seconds):.3f} s"
        )
        correct = sum(right(result, objects) for result, (_, objects) in zip(results, clip, strict=True))
        print(f"boxes right in {correct} of {FRAMES} frames")
        answers.append(results)
    worst = max(
        float(np.abs(one["detection_boxes"] - other["detection_boxes"])[:, :2].max())
        for one, other in zip(*answers, strict=True)
    )
    print("with and without the accelerator the boxes agree:", worst < 1e-2)
    for kind, score, box in zip(
        *(answers[0][0][f"detection_{name}"][0] for name in ("classes", "scores", "boxes")), strict=True
    ):
        if score > 0.5:
            print(f"frame 0: {NAMES[int(kind)]} {score:.2f} at {[round(float(side), 2) for side in box]}")
