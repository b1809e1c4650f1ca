"""Run one scenario on a session, through LoadGen or the plain driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from accelrt.errors import OptionError
from accelrt.scenarios import loadgen, plain
from accelrt.scenarios.result import ScenarioResult
from accelrt.scenarios.scenario import Effort, Feedable, Scenario

DriverName: TypeAlias = Literal["auto", "loadgen", "plain"]


def measure(
    session: Feedable,
    samples: Sequence[Mapping[str, Any]],
    scenario: Scenario,
    effort: Effort | None = None,
    *,
    driver: DriverName = "auto",
) -> ScenarioResult:
    """Measure a session in one scenario, after a warm-up.

    Args:
        session: What `accelrt.load` returns, or anything with its ``predict``, ``submit`` and ``map``.
        samples: The library that queries draw from, each the inputs of one call by name.
        scenario: What to ask.
        effort: How long, `Effort()` by default: ten seconds, and 100 queries.
        driver: ``loadgen``, ``plain``, or ``auto``: LoadGen if it is installed.

    Raises:
        OptionError: There are no samples, or no such driver.
        BenchmarkError: LoadGen was asked for and is not installed, or gave no result.
        Whatever the session raises for a sample: the run ends with the first failure.
    """
    effort = effort or Effort()
    if not samples:
        raise OptionError("There are no samples to measure with.", hint="Give at least one mapping of inputs.")
    chosen = resolve(driver)
    warm_up(session, samples, effort.warmup)
    run = loadgen.run if chosen == loadgen.NAME else plain.run
    return run(session, samples, scenario, effort)


def resolve(driver: DriverName) -> str:
    """Return which driver a name means here.

    Raises:
        OptionError: There is no such driver.
    """
    if driver == "auto":
        return loadgen.NAME if loadgen.is_available() else plain.NAME
    if driver not in (loadgen.NAME, plain.NAME):
        raise OptionError(f"There is no driver {driver!r}; there are auto, loadgen and plain.")
    return driver


def warm_up(session: Feedable, samples: Sequence[Mapping[str, Any]], calls: int) -> None:
    """Call the session in this thread and through its pool, each of whose workers keeps resources of its own."""
    drawn = [samples[index % len(samples)] for index in range(calls)]
    for sample in drawn:
        session.predict(sample)
    for _ in session.map(drawn):
        pass
