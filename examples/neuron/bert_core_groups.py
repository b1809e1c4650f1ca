"""Seven BERT models in one process, each on a core group of its own: NEURONCORE_GROUP_SIZES=8,1,1,1,1,2,2.

That is the vendor's variable for Inf1. Models take groups in the order in which they are loaded. The sixteen cores of
the inf1.6xlarge are emulated: placement, memory and roundings are shown, not speed.

python examples/neuron/bert_core_groups.py
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

import accelrt
from accelrt.runtime.occupancy import cores
from accelrt.testing.models import bert_base

GROUPS = "8,1,1,1,1,2,2"
INSTANCE = {"instance": "inf1.6xlarge", "threads": 1}
SEQUENCE, VOCABULARY = 32, 500
TOLERANCE = 0.05
"""Relative error that bf16 may have against float32."""


def sentence(seed: int) -> dict[str, np.ndarray]:
    """Return the inputs of one call: random tokens, the last quarter of them padding."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (1, SEQUENCE))
    mask = (np.arange(SEQUENCE) < SEQUENCE * 3 // 4).astype(np.int64)[None]
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}


def main() -> None:
    """Load seven models, show who holds what, let them answer at once, and compare each with itself on the CPU."""
    os.environ["NEURONCORE_GROUP_SIZES"] = GROUPS
    models = [
        bert_base(batch=1, sequence=SEQUENCE, layers=2, hidden=64, heads=4, vocabulary=VOCABULARY, seed=seed)
        for seed in range(len(GROUPS.split(",")))
    ]
    inputs = [sentence(seed) for seed in range(8)]
    with ExitStack() as stack:
        sessions = []
        for number, model in enumerate(models):
            # On Inf1 embeddings run on the CPU by the vendor's design, so that much falls back without a warning.
            artifact = accelrt.compile(model, "neuron/emulator", options=INSTANCE, fallback="allow")
            sessions.append(stack.enter_context(accelrt.load(artifact)))
            placed = artifact.placement.nodes_by_engine
            print(f"model {number}: {placed} on {sessions[-1].stats().replicas[0].devices[0]}")
        print("Who holds which core (emulated):")
        for core in cores("neuron/emulator", {"instance": INSTANCE["instance"]}).cores:
            print(f"  {core.device.name:10} group {core.group}: {', '.join(core.holders)}")
        # Seven callers at once, one for each model.
        with ThreadPoolExecutor(len(sessions)) as pool:
            answers = list(pool.map(lambda session: [session.predict(each) for each in inputs], sessions))
    worst = 0.0
    for model, given in zip(models, answers, strict=True):
        with accelrt.load(model, backend="cpu") as session:
            for each, answer in zip(inputs, given, strict=True):
                for name, expected in session.predict(each).items():
                    error = np.linalg.norm(answer[name] - expected) / np.linalg.norm(expected)
                    worst = max(worst, float(error))
    if worst > TOLERANCE:
        sys.exit(f"A model's answers are not its own on the CPU: relative error {worst:.1e}.")
    print(f"{len(models)} models answered {len(inputs)} calls each at the same time, all as on the CPU within bf16.")
    print("Emulated on the CPU: this says nothing about the speed of an Inferentia.")


if __name__ == "__main__":
    main()
