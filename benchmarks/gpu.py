"""accelrt on an NVIDIA GPU against PyTorch and onnxruntime: ``python benchmarks/gpu.py PART --out FOLDER``.

Parts:

- ``models``: latency and throughput of ResNet-50 and BERT-base (128 tokens), batch 1, 8 and 64, in fp32, bf16 and fp16:
  every usable engine of accelrt's ``cuda`` backend (``--auto`` adds the target ``auto``) beside eager PyTorch,
  `torch.compile`, a CUDA graph of PyTorch, and onnxruntime's CUDA provider with and without IO binding and CUDA graph.
- ``roofline``: the share of the GPU's measured rate of bf16 matrix products that both networks reach at batch 64.
- ``fallback``: a graph with nodes in its middle that no GPU engine takes: the answer, the bytes that cross, what is
  refused.
- ``soak SECONDS``: two models under 16 threads: right answers, memory that does not grow.
- ``suite``: ONNX's backend suite through the backend.

Each part prints a table and writes ``FOLDER/PART.json`` as it goes; it exits with 1 if a claim was missed, with 2 if
there is no GPU. ``--budget`` bounds the seconds of a part: what no longer fits is a row that says so. ``--dry`` runs
every line on the CPU with small models; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
from measure import interleave, machine
from onnx import TensorProto, helper, numpy_helper

import accelrt
from accelrt.errors import AccelrtError, UnsupportedNodes
from accelrt.partition.report import human_bytes
from accelrt.testing.models import bert_base, resnet50

PARTS = ("models", "roofline", "fallback", "soak", "suite")
NETWORKS = ("resnet50", "bert")
PRECISIONS = ("fp32", "bf16", "fp16")
BATCHES = (1, 8, 64)
THREADS = 16
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Relative L2 error that a contestant of accelrt may have in the networks, against float32 on the CPU."""
GROWTH_BYTES = 64 << 20
"""Memory by which a soak may end above where it began: allocators round, and 1 % of a model is less."""
AS_FAST = 1.02
"""Of the latency of the best other contestant: as fast, within what medians of one run scatter."""
OF_EAGER = 0.5
"""Of the latency of eager PyTorch, at batch 1."""
EAGER = "torch eager"
MATRIX = 8192
SECONDS_EACH = 1.5
"""About how long the timed calls of one table take together."""


@dataclass
class Report:
    """What a part found: rows for the table, claims, and whatever else goes into the JSON."""

    part: str
    out: Path
    dry: bool
    device: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: dict[str, bool] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, print it, and write the JSON, so that a part that is killed leaves what it had."""
        self.rows.append(row)
        print("  ".join(_cell(key, value) for key, value in row.items()), flush=True)
        self.write()

    def claim(self, text: str, held: bool) -> None:
        """Say whether something held."""
        self.claims[text] = bool(held)
        print(f"{'held  ' if held else 'MISSED'}  {text}", flush=True)
        self.write()

    def write(self) -> None:
        """Write ``PART.json``."""
        document = {"machine": f"{machine()}, {self.device}", **asdict(self)}
        del document["out"]
        (self.out / f"{self.part}.json").write_text(json.dumps(document, indent=1) + "\n")


def _cell(key: str, value: Any) -> str:
    match value:
        case None:
            return f"{key} -"
        case float() if key == "error":
            return f"{key} {value:.1e}"
        case float():
            return f"{key} {value:10.3f}"
        case str() if key == "contestant":
            return f"{value:42}"
        case str():
            return value
    return f"{key} {value}"


def main() -> None:
    """Run one part."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "dry run on the CPU: figures mean nothing" if arguments.dry else _gpu()
    from gpu_contestants import ground

    report = Report(arguments.part, arguments.out, arguments.dry, device)
    print(f"{arguments.part}\n{machine()}\n{device}", flush=True)
    with ground(dry=arguments.dry) as place:
        {"models": models, "roofline": roofline, "fallback": fallback, "soak": soak, "suite": suite}[arguments.part](
            place, arguments, report
        )
    report.write()
    sys.exit(0 if all(report.claims.values()) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("seconds", nargs="?", type=float, default=60.0, help="how long to soak")
    parser.add_argument("--out", type=Path, default=Path(), help="where the JSON goes")
    parser.add_argument("--dry", action="store_true", help="run every line on the CPU with small models")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which nothing new is begun")
    parser.add_argument("--auto", action="store_true", help="let accelrt choose, too")
    parser.add_argument("--max-autotune", action="store_true", help="compile with PyTorch's longest search, too")
    parser.add_argument(
        "--together", type=int, default=0, help="first compile so many tables at once, so that only measuring is serial"
    )
    parser.add_argument(
        "--leave-out", nargs="+", default=(), metavar="TEXT", help="contestants with this in their name"
    )
    parser.add_argument("--prepare", action="store_true", help="compile and measure nothing; caches keep the results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    return parser.parse_args()


def _gpu() -> str:
    """Return what GPU there is; exits with 2 if there is none."""
    try:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            memory = human_bytes(properties.total_memory)
            return f"{properties.name}, {memory}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        missing = f"torch {torch.__version__} finds none"
    except ImportError as error:
        missing = f"PyTorch cannot be imported: {error}"
    print(f"This benchmark needs an NVIDIA GPU, and {missing}. `--dry` runs it on the CPU.", file=sys.stderr)
    sys.exit(2)


# Latency and throughput


def models(ground: Any, arguments: argparse.Namespace, report: Report) -> None:
    """Measure all contestants of each network, batch size and precision, those that matter most first."""
    if arguments.together and not arguments.prepare:
        _compile_together(arguments, report)
    end = time.monotonic() + arguments.budget
    rate = _matrix_rate(ground, 256 if ground.dry else MATRIX)
    report.extra["bf16_matrix_tflop_per_second"] = rate / 1e12
    print(f"bf16 products of {MATRIX}: {rate / 1e12:.1f} TFLOP/s", flush=True)
    for precision in sorted(arguments.precisions, key=("bf16", "fp16", "fp32").index):
        for batch in arguments.batches:
            for network in arguments.networks:
                _table(ground, arguments, report, (network, batch, precision), end)


def _compile_together(arguments: argparse.Namespace, report: Report) -> None:
    """Have processes compile for all tables. They contend for the GPU, so nothing is timed or tuned in them."""
    started = time.monotonic()
    waiting = [(n, str(b), p) for p in arguments.precisions for b in arguments.batches for n in arguments.networks]
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < arguments.together:
            network, batch, precision = waiting.pop(0)
            command = [sys.executable, __file__, "models", "--prepare", "--networks", network, "--batches", batch]
            command += ["--precisions", precision, "--out", tempfile.mkdtemp(), *(["--dry"] if arguments.dry else [])]
            command += ["--leave-out", *arguments.leave_out] if arguments.leave_out else []
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment))
        time.sleep(0.2)
    report.extra["seconds_to_compile_together"] = time.monotonic() - started
    print(f"compiled together in {time.monotonic() - started:.0f} s", flush=True)


def _table(ground: Any, arguments: argparse.Namespace, report: Report, which: tuple[str, int, str], end: float) -> None:
    from gpu_contestants import Contestant, reference, relative_l2
    from gpu_networks import matrix_flops

    network, batch, precision = which
    label = {"network": network, "batch": batch, "precision": precision}
    with ExitStack() as stack:
        stack.callback(ground.clear)
        task = _task(stack, ground, network, batch, precision)
        makers = [
            (name, make)
            for name, make in _makers(ground, arguments, task)
            if not any(text in name for text in arguments.leave_out)
            # Of those that compile; plain torch.compile finds what the frozen form left in inductor's cache.
            and (not arguments.prepare or "accelrt" in name or "frozen" in name)
        ]
        truth = reference(task)
        ready: dict[str, Contestant] = {}
        errors: dict[str, float] = {}
        for name, make in makers:
            if time.monotonic() > end:
                report.add({**label, "contestant": name, "remark": "not run: the budget of time was spent"})
                continue
            started = time.monotonic()
            try:
                made = make()
                for one, contestant in made.items():
                    stack.callback(contestant.close)
                    errors[one] = relative_l2(contestant.fetch(contestant.run()), truth)
            except Exception as error:  # noqa: BLE001 - a contestant that cannot run is told, and takes no part
                text = " ".join(f"{type(error).__name__}: {error}".split())
                report.add({**label, "contestant": name, "remark": f"not run: {text[:300]}"})
                continue
            ready |= made
            report.extra.setdefault("seconds_to_prepare", {})[f"{network} {batch} {precision}: {name}"] = (
                time.monotonic() - started
            )
        if ready and not arguments.prepare:
            _time(ready, errors, label, report, matrix_flops(task.model))
        ready.clear()  # before what they held on the device is freed


def _time(
    ready: Mapping[str, Any], errors: Mapping[str, float], label: Mapping[str, Any], report: Report, flops: float
) -> None:
    runs: dict[str, Callable[[], object]] = {name: one.run for name, one in ready.items()}
    once = sum(statistics.median(times) for times in interleave(runs, rounds=3, warmup=3).values())
    samples = interleave(runs, rounds=min(200, max(10, int(SECONDS_EACH / once))), warmup=2)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    for name, times in samples.items():
        deciles = statistics.quantiles(times, n=10)
        report.add(
            {
                **label,
                "contestant": name,
                "n": len(times),
                "ms": medians[name] * 1e3,
                "p10_ms": deciles[0] * 1e3,
                "p90_ms": deciles[8] * 1e3,
                "per_second": label["batch"] / medians[name],
                "tflop_per_second": flops / medians[name] / 1e12,
                "error": errors[name],
                "remark": ready[name].remark,
            }
        )
    where = f"{label['network']}, batch {label['batch']}, {label['precision']}"
    ours = {name: s for name, s in medians.items() if name.startswith("accelrt") and "host" not in name}
    others = {name: s for name, s in medians.items() if not name.startswith("accelrt") and "host" not in name}
    bound = TOLERANCE[str(label["precision"])]
    for name in ours:
        report.claim(f"{where}: {name} within {bound:g} of float32: {errors[name]:.1e}", errors[name] <= bound)
    if ours and others:
        best, peer = min(ours, key=lambda name: ours[name]), min(others, key=lambda name: others[name])
        report.extra.setdefault("against_the_best", {})[where] = {
            "accelrt": best,
            "other": peer,
            "ratio": ours[best] / others[peer],
        }
        ratio = ours[best] / others[peer]
        if not report.dry:
            report.claim(f"{where}: {best} takes {ratio:.3f} times {peer} (at most {AS_FAST})", ratio <= AS_FAST)
            if label["batch"] == 1 and EAGER in others:
                share = ours[best] / others[EAGER]
                report.claim(f"{where}: {share:.2f} of eager PyTorch (at most {OF_EAGER})", share <= OF_EAGER)


def _makers(ground: Any, arguments: argparse.Namespace, task: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    from gpu_contestants import accelrt_on, onnxruntime_as, torch_as

    for target in (*ground.engines(), *(("auto",) if arguments.auto else ())):
        yield f"accelrt {target}", partial(accelrt_on, ground, task, target)
    for way in ("host to host", "bound", "CUDA graph"):
        yield f"onnxruntime, {way}", partial(onnxruntime_as, ground, task, way)
    # At larger batches the frozen and recorded form is as fast as these, and they take long to make.
    slower = ("compile", "compile reduce-overhead") if task.batch == 1 else ()
    compiled = ("compile frozen and CUDA graph", *slower)
    longest = ("compile max-autotune-no-cudagraphs",) if arguments.max_autotune else ()
    for way in ("eager", "CUDA graph", *compiled, *longest):
        yield f"torch {way}", partial(torch_as, ground, task, way)


def _task(stack: ExitStack, ground: Any, network: str, batch: int, precision: str) -> Any:
    from gpu_contestants import Task
    from gpu_networks import Bert, ResNet50

    rng = np.random.default_rng(batch)
    feeds: dict[str, np.ndarray[Any, Any]]
    module: Callable[[], Any]
    if network == "resnet50":
        image = 32 if ground.dry else 224
        model = resnet50(batch=batch, image=image)
        feeds = {"image": rng.standard_normal((batch, 3, image, image), dtype=np.float32)}
        module = ResNet50
    else:
        size = (
            {"layers": 2, "hidden": 64, "heads": 4, "vocabulary": 500}
            if ground.dry
            else {"layers": 12, "hidden": 768, "heads": 12, "vocabulary": 30522}
        )
        tokens = 16 if ground.dry else 128
        model = bert_base(batch=batch, sequence=tokens, **size)
        mask = np.ones((batch, tokens), np.int64)
        mask[::2, tokens * 3 // 4 :] = 0
        feeds = {
            "input_ids": rng.integers(0, size["vocabulary"], (batch, tokens)),
            "attention_mask": mask,
            "token_type_ids": rng.integers(0, 2, (batch, tokens)),
        }
        module = partial(Bert, **size)
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
    onnx.save(model, path)
    return Task(model, path, module, feeds, precision)


# Roofline


def roofline(ground: Any, arguments: argparse.Namespace, report: Report) -> None:
    """Measure the rate of bf16 matrix products, and the share of it that networks reach at batch 64."""
    from gpu_contestants import accelrt_on, reference, relative_l2, torch_as
    from gpu_networks import matrix_flops

    size, batch = (256, 2) if ground.dry else (MATRIX, 64)
    before = _matrix_rate(ground, size)
    for network in arguments.networks:
        with ExitStack() as stack:
            stack.callback(ground.clear)
            task = _task(stack, ground, network, batch, "bf16")
            flops, truth = matrix_flops(task.model), reference(task)
            makers: list[tuple[str, Callable[[], Any]]] = [
                (f"accelrt {target}", partial(accelrt_on, ground, task, target)) for target in ground.engines()
            ]
            makers += [
                (f"torch {way}", partial(torch_as, ground, task, way))
                for way in ("CUDA graph", "compile frozen and CUDA graph")
            ]
            for name, make in makers:
                try:
                    contestant = make()[name]
                    stack.callback(contestant.close)
                    error = relative_l2(contestant.fetch(contestant.run()), truth)
                    (times,) = interleave({name: contestant.run}, rounds=5 if ground.dry else 50, warmup=5).values()
                except Exception as failed:  # noqa: BLE001 - a contestant that cannot run is told, and takes no part
                    report.add({"network": network, "contestant": name, "remark": f"not run: {str(failed)[:300]}"})
                    continue
                rate = flops / statistics.median(times)
                report.add(
                    {
                        "network": network,
                        "batch": batch,
                        "contestant": name,
                        "ms": statistics.median(times) * 1e3,
                        "gflop": flops / 1e9,
                        "tflop_per_second": rate / 1e12,
                        "share": rate / before,
                        "error": error,
                        "remark": contestant.remark,
                    }
                )
    after = _matrix_rate(ground, size)
    report.extra["matrix"] = {"size": size, "tflop_per_second": [before / 1e12, after / 1e12]}
    print(f"bf16 products of {size}: {before / 1e12:.1f} TFLOP/s before, {after / 1e12:.1f} after", flush=True)


def _matrix_rate(ground: Any, size: int) -> float:
    """Return the operations a second of square bf16 matrix products: the best of five times ten in a row."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=ground.device) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        ground.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        ground.synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


# Fallback


def fallback(ground: Any, arguments: argparse.Namespace, report: Report) -> None:
    """Run a graph whose middle turns numbers into text and back, which no GPU does."""
    model, x = _detour(), np.random.default_rng(0).standard_normal((4, 8, 16, 16), dtype=np.float32)
    with accelrt.load(accelrt.compile(model, "cpu/onnxruntime"), fallback="error") as session:
        truth = session.predict(x)["y"]
    for target in ground.engines():
        try:
            accelrt.compile(model, target, fallback="error", precision="fp32")
            refused = "nothing"
        except UnsupportedNodes as error:
            refused = error.message
        report.claim(f"{target}: fallback='error' names the node: {refused}", "to_text" in refused)
        artifact = accelrt.compile(model, target, fallback="allow", precision="fp32")
        print(artifact.placement.text(), flush=True)
        with accelrt.load(artifact, fallback="error") as session:
            calls = 20
            found = [session.predict(x)["y"] for _ in range(calls)]
            stats = session.stats()
        worst = max(float(np.linalg.norm(one - truth) / np.linalg.norm(truth)) for one in found)
        foretold = [
            tuple(getattr(segment, side) for segment in artifact.placement.segments)
            for side in ("from_host", "to_host")
        ]
        counted = [(each.to_device / calls, each.to_host / calls) for each in stats.traffic]
        report.add(
            {
                "contestant": target,
                "segments": len(artifact.placement.segments),
                "error": worst,
                "to_device": counted[0][0] if counted else None,
                "to_host": counted[0][1] if counted else None,
                "ms": stats.latency.p50_ms,
            }
        )
        report.claim(f"{target}: right to {worst:.1e} (1e-3)", worst <= 1e-3)
        sums = tuple(float(sum(side)) for side in foretold)
        report.claim(f"{target}: bytes a call {counted[:1]} as foretold {sums}", counted[:1] == [sums])


def _detour() -> onnx.ModelProto:
    """Build y = Conv(text(Relu(Conv(x)))) + Relu(Conv(x)); the sum may read its second term where it was left."""
    random = np.random.default_rng(1)
    weights = {
        name: random.standard_normal((8, 8, 3, 3), dtype=np.float32) / np.float32(np.sqrt(36)) for name in ("w", "v")
    }
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first", **pads),
        helper.make_node("Relu", ["a"], ["b"], name="positive"),
        helper.make_node("Cast", ["b"], ["t"], name="to_text", to=TensorProto.STRING),
        helper.make_node("Cast", ["t"], ["c"], name="from_text", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["c", "v"], ["d"], name="second", **pads),
        helper.make_node("Add", ["d", "b"], ["y"], name="sum"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 8, 16, 16)) for name in "xy"]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "detour", ports[:1], ports[1:], initializers)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


# Soak


def soak(ground: Any, arguments: argparse.Namespace, report: Report) -> None:
    """Call two models from 16 threads for so long, half of the calls on the device, and watch answers and memory."""
    from gpu_contestants import reference, relative_l2, soaked

    precision = "bf16"
    with ExitStack() as stack:
        pairs: list[tuple[Any, list[tuple[dict[str, Any], list[Any]]]]] = []
        for network in NETWORKS:
            task = _task(stack, ground, network, 2 if ground.dry else 8, precision)
            session = stack.enter_context(soaked(ground, task))
            calls = []
            for turn in range(4):
                feeds = {name: np.ascontiguousarray(np.roll(array, turn, axis=0)) for name, array in task.feeds.items()}
                truth = [np.roll(array, turn, axis=0) for array in reference(task)]
                calls.append((feeds, truth))
            pairs.append((session, calls))
        stop, lock = threading.Event(), threading.Lock()
        counts = {"calls": 0, "wrong": 0, "failed": 0}
        worst, failures = [0.0], []

        def work(seed: int) -> None:
            choice = random.Random(seed)
            while not stop.is_set():
                session, calls = choice.choice(pairs)
                feeds, truth = choice.choice(calls)
                try:
                    if seed % 2:
                        there = {name: ground.put(array) for name, array in feeds.items()}
                        found = [ground.fetch(one) for one in session.predict(there, outputs="device").values()]
                    else:
                        found = list(session.predict(feeds).values())
                    error = relative_l2(found, truth)
                except Exception as error_:  # noqa: BLE001 - counted: none may be lost
                    with lock:
                        counts["failed"] += 1
                        failures.append(" ".join(f"{type(error_).__name__}: {error_}".split())[:300])
                    continue
                with lock:
                    counts["calls"] += 1
                    counts["wrong"] += not error <= TOLERANCE[precision]
                    worst[0] = max(worst[0], error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        samples: list[tuple[float, int, int]] = []
        start = time.monotonic()
        try:
            while (passed := time.monotonic() - start) < arguments.seconds:
                time.sleep(min(0.5, max(0.01, arguments.seconds / 40)))
                samples.append((passed, *_memory(ground)))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        fallbacks = sum(session.stats().fallbacks for session, _ in pairs)
    # The first quarter is for allocators and caches to fill up.
    steady = [sample for sample in samples if sample[0] >= arguments.seconds / 4] or samples
    third = max(1, len(steady) // 3)
    growth = [
        statistics.median(s[side] for s in steady[-third:]) - statistics.median(s[side] for s in steady[:third])
        for side in (1, 2)
    ]
    report.extra |= {"failures": failures[:10], "memory": samples}
    report.add(
        {
            "contestant": f"{THREADS} threads, {len(NETWORKS)} models, {precision}",
            "seconds": arguments.seconds,
            **counts,
            "per_second": counts["calls"] / arguments.seconds,
            "error": worst[0],
            "fallbacks": fallbacks,
            "device_growth_mb": growth[0] / 1e6,
            "host_growth_mb": growth[1] / 1e6,
        }
    )
    report.claim(f"all {counts['calls']} answers right, none lost", not counts["wrong"] and not counts["failed"])
    report.claim("some calls were answered", counts["calls"] > 0)
    report.claim(f"the device's memory grew by {growth[0] / 1e6:.1f} MB (at most 64 MiB)", growth[0] <= GROWTH_BYTES)
    report.claim(f"the host's memory grew by {growth[1] / 1e6:.1f} MB (at most 64 MiB)", growth[1] <= GROWTH_BYTES)


def _memory(ground: Any) -> tuple[int, int]:
    """Return the bytes in use on the device, of all processes, and those of this process on the host."""
    with Path("/proc/self/statm").open() as file:
        host = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if ground.dry:
        return 0, host
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used), host
    finally:
        pynvml.nvmlShutdown()


# The suite of ONNX


def suite(ground: Any, arguments: argparse.Namespace, report: Report) -> None:
    """Run ONNX's backend suite through the backend, in a process of its own."""
    root = Path(__file__).parents[1]
    case = "test_exceptions_are_cases_of_the_suite" if ground.dry else "test_every_case_passes_on_a_gpu"
    log = arguments.out / "suite.xml"
    command: Sequence[str] = (
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(log.resolve())),
        f"tests/contract/test_onnx_suite.py::{case}",
    )
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=max(60.0, arguments.budget)
    )
    tree = ElementTree.parse(log).getroot() if log.exists() else ElementTree.Element("none")
    ran = sum(int(one.get("tests", 0)) - int(one.get("skipped", 0)) for one in tree.iter("testsuite"))
    summary = [one.get("value") for one in tree.iter("property") if one.get("name") == "summary"]
    report.extra["tail"] = done.stdout[-6000:]
    report.add({"contestant": case, "ran": ran, "summary": "; ".join(filter(None, summary)) or "none was written"})
    report.claim(f"the suite passes ({done.stdout.strip().splitlines()[-1:]})", done.returncode == 0 and ran > 0)


if __name__ == "__main__":
    try:
        main()
    except AccelrtError as error:
        sys.exit(f"{type(error).__name__}: {error}")
