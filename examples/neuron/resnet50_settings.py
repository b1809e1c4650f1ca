"""ResNet-50 in the three settings of the published comparison on an inf1.xlarge, emulated.

One image a call on one core; batches of five on one core; a pipeline over four cores. The published figures are about
speed, which an emulator cannot show: here you see what is placed where, and that all three give the same answers.

python examples/neuron/resnet50_settings.py
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

import accelrt
from accelrt.testing.models import resnet50

IMAGE = 112
"""Pixels a side, a quarter of the work of 224: all of this is computed by a CPU."""
IMAGES = 10
INSTANCE = "inf1.xlarge"
TOLERANCE = 0.02
"""Relative error that bf16 may have against float32 here."""

SETTINGS: tuple[tuple[str, int | str, dict[str, Any]], ...] = (
    ("no batching, one core", 1, {}),
    ("batch 5, one core", "batch", {"batch": 5}),
    ("pipeline of four cores", 1, {"cores": 4}),
)
"""What it is called, the batch of the model's inputs, and what `accelrt.compile` is told besides."""


def answers(model: Any, images: np.ndarray, given: Mapping[str, Any], rows: int) -> np.ndarray:
    """Compile, load, show the placement, and return the scores of all images."""
    artifact = accelrt.compile(model, "neuron/emulator", options={"instance": INSTANCE}, **given)
    calls = [images[start : start + rows] for start in range(0, len(images), rows)]
    with accelrt.load(artifact) as session:
        placed = ", ".join(f"{count} nodes on {name}" for name, count in artifact.placement.nodes_by_engine.items())
        devices = ", ".join(session.stats().replicas[0].devices)
        print(f"  {placed} (emulated); segments: {len(artifact.placement.segments)}; cores: {devices}")
        scores = np.concatenate([outputs["scores"] for outputs in session.map(calls)])
        runs = f", in runs of {given['batch']}" if "batch" in given else ""
        print(f"  {len(calls)} call{'s' * (len(calls) > 1)} of {rows} image{'s' * (rows > 1)}{runs}")
    return scores


def main() -> None:
    """Run every setting that this accelrt knows, and compare it with float32 on the CPU."""
    known = inspect.signature(accelrt.compile).parameters
    images = np.random.default_rng(0).standard_normal((IMAGES, 3, IMAGE, IMAGE), np.float32)
    with accelrt.load(resnet50(image=IMAGE), backend="cpu") as session:
        expected = session.predict(images)["scores"]
    print(f"ResNet-50 on an emulated {INSTANCE}, in bf16, {IMAGE} by {IMAGE} pixels")
    missing = []
    for name, batch, given in SETTINGS:
        print(f"{name}:")
        if lacking := [argument for argument in given if argument not in known]:
            print(f"  left out: accelrt.compile of accelrt {accelrt.__version__} takes no {lacking[0]}=")
            missing.append(name)
            continue
        # A user's call of ten images is cut into runs of five by the session.
        rows = IMAGES if "batch" in given else 1
        scores = answers(resnet50(batch=batch, image=IMAGE), images, given, rows)
        error = float(np.linalg.norm(scores - expected) / np.linalg.norm(expected))
        same = int((scores.argmax(axis=1) == expected.argmax(axis=1)).sum())
        print(f"  relative error against float32 {error:.1e}; the same class for {same} of {IMAGES}")
        if error > TOLERANCE:
            sys.exit(f"{name}: the answers differ from those of the CPU.")
    print("outputs agree in all three settings" if not missing else f"outputs agree; left out: {'; '.join(missing)}")
    print("Emulated on the CPU: this says nothing about the speed of an Inferentia.")


if __name__ == "__main__":
    main()
