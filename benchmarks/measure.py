"""What the benchmarks share: interleaved timing, medians and ratios, a table for people and JSON for machines.

Machines are noisy and shared, so contestants take turns within one run, and what counts is the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant: n samples in seconds, and the ratio of its median to that of the contestant named ``against``."""

    name: str
    n: int
    median_s: float
    p10_s: float
    p90_s: float
    ratio: float
    against: str


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, inner: int = 1, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each contestant in turn, ``rounds`` times over; a sample is the mean of ``inner`` calls, in seconds.

    The order is turned by one place every round, so that nobody always follows the same neighbour.
    """
    for run in contestants.values():
        for _ in range(warmup):
            run()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run = contestants[name]
            start = time.perf_counter()
            for _ in range(inner):
                run()
            samples[name].append((time.perf_counter() - start) / inner)
    return samples


def rows(samples: Mapping[str, list[float]], against: str) -> list[Row]:
    """Summarise samples, each against one of them."""
    base = statistics.median(samples[against])
    table = []
    for name, values in samples.items():
        deciles = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
        median = statistics.median(values)
        table.append(Row(name, len(values), median, deciles[0], deciles[8], median / base, against))
    return table


def report(title: str, table: list[Row], claims: Mapping[str, bool], *, unit: str = "ms", extra: object = None) -> None:
    """Print a table and what it was to show; with ``--json FILE`` write everything there too. Exits 1 on a miss."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    arguments = parser.parse_args()
    scale = {"ms": 1e3, "us": 1e6}[unit]
    print(f"\n{title}\n{machine()}")
    width = max((len(row.name) for row in table), default=0)
    print(f"{'':{width}}  {'n':>5}  {'median':>10}  {'p10':>10}  {'p90':>10}  ratio")
    for row in table:
        figures = "  ".join(f"{value * scale:10.3f}" for value in (row.median_s, row.p10_s, row.p90_s))
        print(f"{row.name:{width}}  {row.n:5}  {figures}  {row.ratio:.3f} x {row.against}")
    print(f"(times in {unit})")
    for claim, held in claims.items():
        print(f"{'held  ' if held else 'MISSED'}  {claim}")
    if arguments.json:
        document = {"title": title, "machine": machine(), "rows": [asdict(row) for row in table],
                    "claims": dict(claims), "extra": extra}  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(0 if all(claims.values()) else 1)


def machine() -> str:
    """Say what the figures were measured on."""
    model = platform.machine()
    try:
        with Path("/proc/cpuinfo").open() as lines:
            model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    import os

    packages = []
    for name in ("accelrt", "onnxruntime", "openvino", "numpy"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(packages)}"


def in_fresh_process(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
