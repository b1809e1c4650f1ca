"""The examples that need nothing but accelrt run as they stand, and say what their text promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SAID = {
    "quickstart.py": ["448 of 450 digits right", "p50"],
    "swap_backends.py": ["ACCELRT_BACKEND=cpu/reference", "outputs agree"],
    "read_placement.py": ["As text:", "As data:", "4 nodes left toy/fake", 'With fallback="error":'],
    "choose_automatically.py": ["Candidates for least latency", "CHOSEN", "the first digit is a"],
    "precision_table.py": [
        "cpu/onnxruntime   fp32",
        "cpu/onnxruntime   int8",
        "Refused: cpu/onnxruntime in bf16: 10 of 10",
    ],
    "save_and_load.py": ["digits.accel in another process: the same scores", "sources=False"],
}


@pytest.mark.parametrize("name", SAID)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for words in SAID[name]:
        assert words in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    present = {path.name for path in EXAMPLES.glob("*.py")} | {"plugin/"}
    assert all(f"]({name})" in text for name in present)
