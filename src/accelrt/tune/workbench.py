"""Trials as they are really made: each candidate compiled in one child process and measured in another."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.artifact.candidates import CandidateRow, Measurement, Setup
from accelrt.errors import AccelrtError, IsolatedError, OptionError
from accelrt.isolation import Child
from accelrt.precision.report import VerificationReport
from accelrt.registry import REGISTRY, find_engine
from accelrt.target import parse
from accelrt.tune.goal import Goal

AGREEMENT = 0.05
"""How far the medians of windows may differ before a candidate counts as measured."""

_WINDOW_S, _WINDOW_CALLS, _WINDOWS = 0.2, 3, 3
_TRIAL = "accelrt.tune.trial"
_PLAINLY = {
    "compile_candidate": "compiling or verifying it",
    "open_candidate": "loading it",
    "time_calls": "running it",
}


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Options of ``auto``.

    Attributes:
        trial_timeout_s: Seconds that compiling, verifying or loading one candidate may take.
        trial_memory_bytes: Resident bytes at which a candidate is stopped; None for three quarters of what is free.
        trial_seconds: Seconds after which the measurement of one candidate ends, stable or not; a final between
            several takes as long for each.
    """

    trial_timeout_s: float = 300.0
    trial_memory_bytes: int | None = None
    trial_seconds: float = 15.0

    def __post_init__(self) -> None:
        for name in ("trial_timeout_s", "trial_seconds"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be a number of seconds above 0, not {getattr(self, name)!r}.")
        if self.trial_memory_bytes is not None and self.trial_memory_bytes <= 0:
            raise OptionError(f"trial_memory_bytes must be above 0, not {self.trial_memory_bytes}.")


@dataclass(frozen=True, slots=True)
class Job:
    """What is the same for all candidates, as files and plain data that a child process understands.

    Attributes:
        sources: The graph as an ONNX file, by precision; the one under ``fp32`` stands for those that are not there.
        timed: Files of the call that is timed, by its number of rows; under None as it was given.
        verified: File of the calls that are verified with.
        wanted: File of what the reference gave for those.
        options: Those of the user's options that a target's engines know, by target.
        random: Whether the calls were drawn.
        wholes: Folders that hold the source whole, by the target whose engine takes it so.
    """

    sources: Mapping[str, Path]
    source_format: str
    timed: Mapping[int | None, Path]
    verified: Path
    wanted: Path
    options: Mapping[str, Mapping[str, Any]]
    fallback: str
    verification: Mapping[str, Any]
    classes: Sequence[str]
    rows: int
    random: bool
    wholes: Mapping[str, Path] = field(default_factory=dict)


@dataclass(slots=True)
class _Samples:
    """Windows of one candidate's calls."""

    rows: int
    nanoseconds: list[int] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    elapsed: int = 0
    memory: int = 0

    def add(self, window: Mapping[str, Any]) -> None:
        self.nanoseconds += window["nanoseconds"]
        self.medians.append(float(np.median(window["nanoseconds"])))
        self.elapsed += window["elapsed"]
        self.memory = max(self.memory, window["memory_bytes"])

    @property
    def spread(self) -> float:
        last = self.medians[-_WINDOWS:]
        return max(last) / min(last) - 1

    @property
    def stable(self) -> bool:
        return len(self.medians) >= _WINDOWS and self.spread <= AGREEMENT

    def summary(self, goal: Goal, *, enough: bool) -> Measurement:
        times = np.array(self.nanoseconds) / 1e9
        return Measurement(
            len(times),
            float(np.median(times)),
            float(np.percentile(times, goal.percentile)),
            len(times) * self.rows / (self.elapsed / 1e9),
            self.memory,
            self.spread,
            min(self.medians) / 1e9,
            enough,
        )


class Workbench:
    """Tries set-ups in child processes; use it as a context manager, which ends them.

    Args:
        job: What is the same for all.
        goal: What is measured for.
        limits: Time and memory of one trial.
        folder: Where compiled candidates are put, each in a folder of its own.
    """

    def __init__(self, job: Job, goal: Goal, limits: TuneOptions, folder: Path) -> None:
        self._job, self._goal, self._limits, self._folder = job, goal, limits, folder
        self._memory = limits.trial_memory_bytes or available_bytes() * 3 // 4
        self._children: dict[str, Child] = {}
        self._folders: dict[str, Path] = {}
        self._reports: dict[str, VerificationReport] = {}

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.close()

    def folder_of(self, setup: Setup) -> Path:
        """Return the compiled candidate."""
        return self._folders[str(setup)]

    def report_of(self, setup: Setup) -> VerificationReport:
        """Return the verification of a candidate."""
        return self._reports[str(setup)]

    def try_out(self, setup: Setup) -> CandidateRow:
        """Compile, verify and measure a set-up."""
        row = self.compile(setup)
        if row.reason:
            return row
        try:
            child = self._children[str(setup)] = Child()
            self._call(
                child,
                "open_candidate",
                folder=str(self.folder_of(setup)),
                calls=str(self._job.timed[setup.batch]),
                classes=list(self._job.classes),
            )
            samples = _Samples(setup.batch or self._job.rows)
            end = time.monotonic() + self._limits.trial_seconds / 3
            while not samples.stable and (time.monotonic() < end or not samples.medians):
                samples.add(self._window(child, setup))
        except AccelrtError as error:
            self._drop(str(setup))
            return replace(row, reason=_told(error))
        return replace(row, measurement=samples.summary(self._goal, enough=samples.stable))

    def compile(self, setup: Setup) -> CandidateRow:
        """Compile and verify a set-up; the row has a reason if it is rejected, and none if it is not."""
        job = self._job
        row = CandidateRow(setup, "rejected", "", _nature(setup))
        folder = self._folders[str(setup)] = self._folder / f"candidate-{len(self._folders)}"
        folder.mkdir()
        engine = parse(setup.target).engine
        options = {**job.options[setup.target], **{f"{engine}.{name}": v for name, v in setup.options.items()}}
        try:
            with Child() as child:
                done = self._call(
                    child,
                    "compile_candidate",
                    folder=str(folder),
                    source=str(job.sources.get(setup.precision, job.sources["fp32"])),
                    whole=None if (whole := job.wholes.get(setup.target)) is None else str(whole),
                    target=setup.target,
                    precision=setup.precision,
                    options=options,
                    fallback=job.fallback,
                    source_format=job.source_format,
                    calls=str(job.verified),
                    wanted=str(job.wanted),
                    verification=dict(job.verification),
                    classes=list(job.classes),
                )
        except AccelrtError as error:
            self._drop(str(setup))
            return replace(row, reason=_told(error))
        report = VerificationReport.from_json(done["report"])
        self._reports[str(setup)] = report if job.random is False else replace(report, inputs="random, seed 0")
        row = replace(
            row,
            elsewhere=done["elsewhere"],
            error=max((output.error for output in report.outputs), default=0.0),
            compile_s=done["compile_s"],
            size_bytes=done["size_bytes"],
        )
        if report.passed:
            return row
        self._drop(str(setup))
        worst = report.failures[0]
        return replace(row, reason=f"out of tolerance: {worst.name!r}: {worst.problem}")

    def keep(self, setups: Sequence[Setup]) -> None:
        """End the processes of all others and remove what they compiled."""
        kept = {str(setup) for setup in setups}
        for name in [name for name in self._children if name not in kept]:
            self._drop(name)

    def final(self, setups: Sequence[Setup]) -> list[Measurement | str]:
        """Measure set-ups in turns until each is stable and has enough calls, or time is up."""
        samples = {str(setup): _Samples(setup.batch or self._job.rows) for setup in setups}
        failed: dict[str, str] = {}
        end = time.monotonic() + self._limits.trial_seconds * len(setups)
        turn = 0
        while time.monotonic() < end or turn == 0:
            order = [*setups[turn % len(setups) :], *setups[: turn % len(setups)]] if setups else []
            waiting = [setup for setup in order if str(setup) not in failed]
            if all(self._enough(samples[str(setup)]) for setup in waiting):
                break
            for setup in waiting:
                try:
                    samples[str(setup)].add(self._window(self._children[str(setup)], setup))
                except AccelrtError as error:
                    failed[str(setup)] = _told(error)
                    self._drop(str(setup))
            turn += 1
        return [
            failed[name]
            if name in failed
            else replace(found.summary(self._goal, enough=self._enough(found)), final=True)
            for name, found in samples.items()
        ]

    def _enough(self, samples: _Samples) -> bool:
        return samples.stable and len(samples.nanoseconds) >= self._goal.samples

    def _window(self, child: Child, setup: Setup) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._call(
            child, "time_calls", seconds=_WINDOW_S, least=_WINDOW_CALLS * setup.workers, workers=setup.workers
        )
        return found

    def _call(self, child: Child, function: str, **arguments: Any) -> Any:
        return child.call(
            f"{_TRIAL}:{function}",
            timeout_s=self._limits.trial_timeout_s,
            memory_bytes=self._memory,
            **arguments,
        )

    def _drop(self, name: str) -> None:
        if (child := self._children.pop(name, None)) is not None:
            child.close()
        shutil.rmtree(self._folders[name], ignore_errors=True)


def _told(error: AccelrtError) -> str:
    """Return an error as a reason: on one line, and for a child that died what became of it."""
    text = " ".join(error.message.split())
    if isinstance(error, IsolatedError):
        for function, plainly in _PLAINLY.items():
            text = text.replace(f"{_TRIAL}:{function}", plainly)
    return text if len(text) <= 500 else text[:497] + "..."


def _nature(setup: Setup) -> str:
    target = parse(setup.target)
    return find_engine(REGISTRY.backend(target.backend), target.engine or "").caps.nature


def available_bytes() -> int:
    """Return how much memory is free for new processes: what the kernel says, within the bounds of a container."""
    free = 1 << 62
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return max(free, 1 << 30)
