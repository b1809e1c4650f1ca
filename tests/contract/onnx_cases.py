"""The cases of ONNX's own backend suite, for the suites that run them, and how a run of them is counted."""

from __future__ import annotations

import logging
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import onnx
from onnx.backend.test import BackendTest


class Case(NamedTuple):
    """One case: ``run`` takes None, and raises where the outputs differ; ``proto`` is empty until it has run."""

    name: str
    run: Callable[[Any], None]
    proto: list[onnx.ModelProto]


def cases(backend: Any, runner: type[Any] = BackendTest) -> Iterator[Case]:
    """Yield the suite's cases for the CPU device, through a backend of ONNX's interface.

    Args:
        backend: What runs a model.
        runner: ONNX's runner, or one that compares in another way.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = runner(backend)
    for items in found._test_items.values():
        for name, item in items.items():
            if name.endswith("_cpu"):
                yield Case(name.removesuffix("_cpu"), item.func, item.proto)


@dataclass
class Outcome:
    """What became of the cases: how many passed, and why the others did not."""

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def run_all(backend: Any, runner: type[Any] = BackendTest, after: Callable[[], None] | None = None) -> Outcome:
    """Run every case, without the log lines that a suite of two thousand models would write.

    Args:
        backend: What runs a model.
        runner: As for `cases`.
        after: Called when a case is over, whatever became of it.
    """
    outcome = Outcome()
    logging.disable(logging.WARNING)
    try:
        for case in cases(backend, runner):
            try:
                case.run(None)
                outcome.passed += 1
            except unittest.SkipTest as reason:
                outcome.skipped.append(f"{case.name}: {reason}")
            except Exception as error:
                outcome.failed[case.name] = f"{type(error).__name__}: {error}"
            finally:
                if after is not None:
                    after()
    finally:
        logging.disable(logging.NOTSET)
    return outcome
