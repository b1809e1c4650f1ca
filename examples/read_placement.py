"""The placement: which node runs where and why, as text for people and as data for programs.

An accelerator that lacks operators is needed for this, so a stand-in plays one: it takes convolutions and Relu alone.

    python examples/read_placement.py
"""

from __future__ import annotations

import logging

import accelrt
from accelrt.data import digits_model
from accelrt.errors import UnsupportedNodes
from accelrt.testing.fake import FakeBackend


def main() -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    accelrt.register(FakeBackend.configured("toy", operators={"Conv", "Relu"}))

    # By default, what the target cannot run goes to the CPU, with one warning that says so.
    artifact = accelrt.compile(digits_model(), backend="toy")

    print("As text:")
    print(artifact.explain())

    print("\nAs data:")
    placement = artifact.placement
    for number, segment in enumerate(placement.segments):
        kinds = ", ".join(node.kind for node in segment.nodes)
        print(f"  segment {number} on {segment.engine} in {segment.precision}: {kinds}")
    for refusal in placement.refusals:
        print(f"  {refusal.engine} refused {refusal.node} ({refusal.kind}): {refusal.reason}")
    print(f"  {placement.fallen_back} nodes left {placement.primary}; all: {placement.nodes_by_engine}")

    print('\nWith fallback="error":')
    try:
        accelrt.compile(digits_model(), backend="toy", fallback="error")
    except UnsupportedNodes as error:
        print(f"  {error}")


if __name__ == "__main__":
    main()
