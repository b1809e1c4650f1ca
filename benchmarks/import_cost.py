"""What `import accelrt` costs over `import numpy`, each in fresh processes that take turns.

Claim: at most 40 ms more, and no engine, no onnx, no torch is loaded.
"""

from __future__ import annotations

from measure import in_fresh_process, report, rows

ROUNDS = 15
TIME = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
CONTESTANTS = {
    "import numpy": TIME.format("import numpy"),
    "import numpy, accelrt": TIME.format("import numpy, accelrt"),
    "import accelrt; accelrt.load": TIME.format("import numpy, accelrt; accelrt.load"),
}
HEAVY = ("onnx", "onnxruntime", "onnx_ir", "torch", "tensorflow", "openvino", "rich", "typer")


def main() -> None:
    """Measure and report."""
    samples: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for code in CONTESTANTS.values():
        in_fresh_process(code)
    for _ in range(ROUNDS):
        for name, code in CONTESTANTS.items():
            samples[name].append(float(in_fresh_process(code)))
    table = rows(samples, "import numpy")
    loaded = in_fresh_process(
        f"import accelrt, sys; print([m for m in {HEAVY!r} if m in sys.modules])",
    )
    more = table[1].median_s - table[0].median_s
    claims = {
        f"accelrt costs {more * 1e3:.1f} ms over numpy (limit 40)": more <= 0.040,
        f"loads none of {', '.join(HEAVY)} (found {loaded})": loaded == "[]",
    }
    report("import time", table, claims)


if __name__ == "__main__":
    main()
