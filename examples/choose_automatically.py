"""Let accelrt choose engine, precision and threads for a model, within a tolerance, and read why it chose so.

Run it twice: the second time the choice is found in the cache.
"""

from __future__ import annotations

import time

import accelrt
from accelrt.data import digits_model, held_out_digits


def main() -> None:
    """Choose, and show the table."""
    images, labels = held_out_digits()
    start = time.perf_counter()
    artifact = accelrt.compile(
        digits_model(),
        "auto",
        example_inputs=[images[:1]],
        # What int8 is calibrated with is not what it is verified with.
        calibration=[(images[n : n + 1],) for n in range(50)],
        verify=accelrt.Verification([images[50:]], labels=labels[50:]),
        tolerance=5e-2,
        options={"trial_seconds": 3.0},
    )
    print(f"chosen in {time.perf_counter() - start:.2f} s\n")
    assert artifact.candidates is not None
    print(artifact.candidates.text())
    chosen = artifact.candidates.chosen
    with accelrt.load(artifact) as session:
        scores = session.predict(images[:1])["scores"]
    print(f"\n{chosen.setup}: the first digit is a {scores.argmax()}, and it is a {labels[0]}.")


if __name__ == "__main__":
    main()
