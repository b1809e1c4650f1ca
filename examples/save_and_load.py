"""Artifacts on disk: with and without the source graph, and loaded by another process.

python examples/save_and_load.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import accelrt
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import ArtifactError

# What the other process runs: it needs the file and accelrt, not the model.
CHILD = """
import sys
import numpy as np
import accelrt
with accelrt.load(sys.argv[1], fallback="error") as session:
    outputs = session.predict(np.load(sys.argv[2]))
np.save(sys.argv[3], outputs["scores"])
"""


def main(folder: Path) -> None:
    images = held_out_digits()[0][:20]
    artifact = accelrt.compile(digits_model())
    with accelrt.load(artifact) as session:
        expected = session.predict(images)["scores"]

    # With the source graph, another machine or a newer engine can compile the model again.
    full = artifact.save(folder / "digits.accel")
    # Without it, the file holds the programs alone: it cannot be compiled again, nor fall back.
    bare = artifact.save(folder / "digits-bare.accel", sources=False)
    for path in (digits_model(), full, bare):
        print(f"{path.name:18} {path.stat().st_size / 1000:6.1f} kB")

    np.save(folder / "images.npy", images)
    for path in (full, bare):
        found = folder / f"{path.stem}.npy"
        subprocess.run([sys.executable, "-c", CHILD, path, folder / "images.npy", found], check=True)
        same = np.array_equal(np.load(found), expected)
        print(f"{path.name} in another process: {'the same' if same else 'other'} scores")
        if not same:
            sys.exit(1)

    with accelrt.load(full) as session:
        print(f"loaded here: {session}")
    try:
        from accelrt.artifact.artifact import open_artifact

        open_artifact(bare).source_graph()
    except ArtifactError as error:
        print(f"{bare.name}: {error}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
