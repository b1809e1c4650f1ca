"""The driver over MLPerf's LoadGen (package ``mlcommons-loadgen``, module ``mlperf_loadgen``).

LoadGen is C++ that keeps its state in globals: a process runs one test at a time. It calls back into Python, and an
exception that leaves such a callback ends the process. So tests take turns under a lock, run in a thread of their own
(an interrupt reaches the caller at once), and callbacks let nothing out: the first failure is kept, the test is
brought to an early end, and the failure is raised in the caller's thread.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from accelrt.errors import BenchmarkError
from accelrt.scenarios import plain
from accelrt.scenarios.plain import Sample
from accelrt.scenarios.result import Latency, ScenarioResult, Verdict
from accelrt.scenarios.scenario import (
    PERCENTILES,
    Effort,
    Feedable,
    MultiStream,
    Offline,
    Scenario,
    Server,
    SingleStream,
)

NAME = "loadgen"
_PACKAGE, _MODULE = "mlcommons-loadgen", "mlperf_loadgen"
_ATTEMPTS = 3
"""LoadGen draws up all queries before it starts; where it ran out of them, more are asked for."""

_ONE_AT_A_TIME = threading.Lock()


def is_available() -> bool:
    """Tell whether LoadGen is installed."""
    return find_spec(_MODULE) is not None


def run(session: Feedable, samples: Sequence[Sample], scenario: Scenario, effort: Effort) -> ScenarioResult:
    """Measure one scenario; the session is warm already.

    Raises:
        BenchmarkError: LoadGen is not installed, cannot be loaded, or wrote no result.
        Whatever the session raises for a sample: the run ends with the first failure.
    """
    loadgen = _load()
    pace = _pace(session, samples, scenario, effort)
    for attempt in range(_ATTEMPTS):
        feed = _FEEDS[type(scenario)](loadgen, session, samples)
        with tempfile.TemporaryDirectory(prefix="accelrt-loadgen-") as folder, _ONE_AT_A_TIME:
            _test(loadgen, feed, len(samples), _settings(loadgen, scenario, effort, pace), Path(folder))
            figures = _read(Path(folder))
        if not figures.ran_out or attempt == _ATTEMPTS - 1:
            break
        pace *= 4
    return figures.result(scenario, feed.duration_s)


def _load() -> ModuleType:
    try:
        return import_module(_MODULE)
    except ImportError as error:
        raise BenchmarkError(
            f"MLPerf's LoadGen cannot be loaded: {error}.",
            hint="pip install 'accelrt[bench]', or use the plain driver (--driver plain).",
        ) from error


def _version() -> str:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:  # built by hand
        return "unknown"


def _pace(session: Feedable, samples: Sequence[Sample], scenario: Scenario, effort: Effort) -> float:
    """Return about how many queries a second there will be (samples, offline): LoadGen wants to know beforehand.

    More than a short run shows: a guess that is too low ends the test early. One that is too high costs memory, and
    in the offline scenario time, since there all queries are run.
    """
    if isinstance(scenario, Server):
        return scenario.target_qps
    short = Effort(min(effort.seconds / 10, 0.5), min(effort.queries, 10), effort.warmup, effort.seed)
    trial = plain.run(session, samples, scenario, short)
    return 1.2 * trial.throughput if isinstance(scenario, Offline) else 2 * trial.queries / trial.duration_s


def _settings(loadgen: ModuleType, scenario: Scenario, effort: Effort, pace: float) -> Any:
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = math.ceil(effort.seconds * 1e3)
    settings.min_query_count = effort.queries
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = effort.seed
    match scenario:
        case SingleStream():
            settings.scenario = loadgen.TestScenario.SingleStream
            settings.single_stream_expected_latency_ns = max(1, round(1e9 / pace))
            settings.single_stream_target_latency_percentile = scenario.percentile / 100
        case MultiStream():
            settings.scenario = loadgen.TestScenario.MultiStream
            settings.multi_stream_samples_per_query = scenario.samples_per_query
            settings.multi_stream_expected_latency_ns = max(1, round(1e9 / pace))
            settings.multi_stream_target_latency_percentile = scenario.percentile / 100
        case Server():
            settings.scenario = loadgen.TestScenario.Server
            settings.server_target_qps = scenario.target_qps
            settings.server_target_latency_ns = max(1, round(scenario.latency_bound_s * 1e9))
            settings.server_target_latency_percentile = scenario.percentile / 100
            settings.server_max_async_queries = _hopeless(scenario, effort)
        case Offline():
            settings.scenario = loadgen.TestScenario.Offline
            settings.offline_expected_qps = pace
            # LoadGen counts one query here whatever it is told: that many samples have to come from the pace.
            if effort.seconds > 0:
                settings.offline_expected_qps = max(pace, effort.queries / effort.seconds)
    return settings


def _hopeless(scenario: Server, effort: Effort) -> int:
    """Return how many queries under way tell that the bound is lost: LoadGen then ends, instead of draining for hours.

    Those whose time is not yet up are about Poisson with mean rate times bound, six deviations at the most; all others
    are late, and more than the percentile grants of the whole run.
    """
    total = max(effort.queries, scenario.target_qps * effort.seconds)
    young = scenario.target_qps * scenario.latency_bound_s
    return math.ceil(total * (1 - scenario.percentile / 100) + young + 6 * math.sqrt(young) + 10)


class _Feed:
    """What LoadGen calls: `issue` with queries, `flush` when it has issued the last one. Neither lets anything out."""

    def __init__(self, loadgen: ModuleType, session: Feedable, samples: Sequence[Sample]) -> None:
        self._response, self._complete = loadgen.QuerySampleResponse, loadgen.QuerySamplesComplete
        self._session, self._samples = session, samples
        self._lock = threading.Lock()
        self._held: list[int] = []
        self._flushed = False
        self._first: float | None = None
        self._last = 0.0
        self.failure: BaseException | None = None

    @property
    def duration_s(self) -> float:
        """Seconds from the first query to the last answer."""
        return self._last - (self._first if self._first is not None else self._last)

    def issue(self, queries: Sequence[Any]) -> None:
        """Answer queries, or see that they will be."""
        if self._first is None:
            self._first = time.perf_counter()
        open_ = [query.id for query in queries]
        try:
            if self.failure is None:
                self._answer(queries, open_)
        except BaseException as error:  # noqa: BLE001 - it would end the process
            self.fail(error)
        if open_:
            self._let_go(open_)

    def flush(self) -> None:
        """Answer what was held back."""
        with self._lock:
            self._flushed = True
            held, self._held = self._held, []
        self.done(held)

    def fail(self, error: BaseException) -> None:
        """Keep the first failure; from now on nothing is computed."""
        with self._lock:
            self.failure = self.failure or error

    def done(self, ids: Sequence[int]) -> None:
        """Tell LoadGen that samples are answered. In performance mode it looks at no data."""
        if ids:
            self._last = time.perf_counter()
            self._complete([self._response(id_, 0, 0) for id_ in ids])

    def _answer(self, queries: Sequence[Any], open_: list[int]) -> None:
        """Answer queries, and take from ``open_`` each one whose answer is given or will be."""
        raise NotImplementedError

    def _let_go(self, ids: Sequence[int]) -> None:
        """Answer queries of a test that has failed."""
        self.done(ids)


class _SingleStreamFeed(_Feed):
    def _answer(self, queries: Sequence[Any], open_: list[int]) -> None:
        for query in queries:
            self._session.predict(self._samples[query.index])
            self.done([open_.pop(0)])


class _TogetherFeed(_Feed):
    """Multi-stream and offline: all samples of a query go through the session's pool."""

    def _answer(self, queries: Sequence[Any], open_: list[int]) -> None:
        remaining = iter(tuple(open_))
        for _ in self._session.map(self._samples[query.index] for query in queries):
            if self.failure is not None:
                return
            id_ = next(remaining)
            # Taken first: whatever happens then, it is not answered twice.
            del open_[0]
            self.done([id_])


class _ServerFeed(_Feed):
    def _answer(self, queries: Sequence[Any], open_: list[int]) -> None:
        for query in queries:
            future = self._session.submit(self._samples[query.index])
            open_.remove(query.id)
            future.add_done_callback(partial(self._answered, query.id))

    def _answered(self, id_: int, future: Future[Any]) -> None:
        """Runs in the thread that gave the answer."""
        if future.cancelled():
            self.fail(BenchmarkError("The session cancelled a query.", hint="Keep it open during the test."))
        elif (error := future.exception()) is not None:
            self.fail(error)
        if self.failure is None:
            self.done([id_])
        else:
            self._let_go([id_])

    def _let_go(self, ids: Sequence[int]) -> None:
        # Held back, so that too many are under way and LoadGen gives up: it has no other way to end a schedule.
        with self._lock:
            if not self._flushed:
                self._held.extend(ids)
                return
        self.done(ids)


_FEEDS: dict[type, Callable[[ModuleType, Feedable, Sequence[Sample]], _Feed]] = {
    SingleStream: _SingleStreamFeed,
    MultiStream: _TogetherFeed,
    Server: _ServerFeed,
    Offline: _TogetherFeed,
}


def _test(loadgen: ModuleType, feed: _Feed, samples: int, settings: Any, folder: Path) -> None:
    """Run one test in a thread of its own.

    Raises:
        What a callback raised, or what interrupts the caller.
    """
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    log = loadgen.LogSettings()
    log.log_output, log.enable_trace = output, False
    system = loadgen.ConstructSUT(feed.issue, feed.flush)
    library = loadgen.ConstructQSL(samples, samples, _nothing, _nothing)

    over = threading.Event()

    def start() -> None:
        try:
            # A file named audit.config in the working folder would otherwise change the test.
            loadgen.StartTestWithLogSettings(system, library, settings, log, str(folder / "no-audit.config"))
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            feed.fail(error)
        finally:
            over.set()

    threading.Thread(target=start, name="accelrt-loadgen").start()
    try:
        # Not Thread.join: in Python 3.11 a join that was interrupted takes the thread for dead, and the next returns.
        # In short waits, since a signal that another thread receives does not end this one's.
        while not over.wait(0.2):
            pass
    except BaseException as error:
        feed.fail(error)
        over.wait()
        raise
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)
    if feed.failure is not None:
        raise feed.failure


def _nothing(indices: Sequence[int]) -> None:
    """Load or unload samples, which are in memory all the time."""


class _Figures:
    """The detailed log: one JSON object a line after a marker, of which ``key`` and ``value`` count."""

    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        self._values = {entry["key"]: entry["value"] for entry in entries}
        self._errors = [str(entry["value"]) for entry in entries if entry["key"].startswith("error_")]
        if "result_validity" not in self._values:
            raise BenchmarkError(f"LoadGen gave no verdict. {' '.join(self._errors)}".strip())

    @property
    def ran_out(self) -> bool:
        """Whether the test was over too early because too few queries had been drawn up."""
        exhausted = any("Ran out of generated queries" in error for error in self._errors)
        return exhausted or (not self._errors and not self._values["result_min_duration_met"])

    def result(self, scenario: Scenario, duration_s: float) -> ScenarioResult:
        values = self._values
        queries, per_query = int(values["result_query_count"]), int(values["generated_samples_per_query"])
        samples = queries * per_query
        verdict: Verdict = "VALID" if values["result_validity"] == "VALID" else "INVALID"
        latency = self._latency(queries if isinstance(scenario, MultiStream) else samples, scenario)
        throughput = self._throughput(scenario)
        return ScenarioResult(
            scenario, NAME, _version(), queries, samples, duration_s, latency,
            samples / duration_s if throughput is None else throughput,
            verdict, () if verdict == "VALID" else self._reasons(),
        )  # fmt: skip

    def _throughput(self, scenario: Scenario) -> float | None:
        """Return LoadGen's own figure; it has none for multi-stream."""
        key = {
            SingleStream: "result_qps_with_loadgen_overhead",
            Server: "result_completed_samples_per_sec",
            Offline: "result_samples_per_second",
        }.get(type(scenario))
        return None if key is None else float(self._values[key])

    def _latency(self, n: int, scenario: Scenario) -> Latency:
        one, percentile = ("query_", "per_query_") if isinstance(scenario, MultiStream) else ("", "")
        mean, least, most = (self._values[f"result_{which}_{one}latency_ns"] / 1e9 for which in ("mean", "min", "max"))
        p50, p90, p95, p97, p99, p99_9 = (
            self._values[f"result_{percent:.2f}_percentile_{percentile}latency_ns"] / 1e9 for percent in PERCENTILES
        )
        return Latency(n, mean, least, p50, p90, p95, p97, p99, p99_9, most)

    def _reasons(self) -> tuple[str, ...]:
        """Return why a test is INVALID, in LoadGen's words where it has some."""
        values = self._values
        told = {
            "result_perf_constraints_met": "The latency at the percentile was above the bound.",
            "result_min_duration_met": "The least duration was not reached.",
            "result_min_queries_met": "The least number of queries was not reached.",
        }
        reasons = [*self._errors, *(text for key, text in told.items() if values.get(key) is False)]
        reasons += _sentences(values.get("result_invalid_reason", ""))
        if values.get("early_stopping_met") is False:
            reasons += _sentences(values.get("early_stopping_result", ""))
        return tuple(reasons)


def _sentences(text: str) -> list[str]:
    """Split LoadGen's advice, whose items begin with asterisks and are broken into lines."""
    return [" ".join(item.split()) for item in text.split(" * ") if item.strip()]


def _read(folder: Path) -> _Figures:
    entries = []
    for line in (folder / "mlperf_log_detail.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        _, _, text = line.partition(" ")
        try:
            entries.append(json.loads(text))
        except ValueError:  # a line that is no entry
            continue
    return _Figures(entries)
