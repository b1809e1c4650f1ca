"""Measure a session the way MLPerf does: single-stream, multi-stream, server and offline.

`measure` runs one scenario, `sweep` finds the highest rate of arrivals that a latency bound allows::

    from accelrt.scenarios import Effort, Server, measure

    with accelrt.load("resnet50.accel") as session:
        result = measure(session, [image], Server(target_qps=50, latency_bound_s=0.1), Effort(seconds=10))
        print(result.verdict, result.latency.p99_s, *result.reasons)
"""

from accelrt.scenarios.drivers import DriverName, measure
from accelrt.scenarios.rates import Sweep, SweepStep, sweep
from accelrt.scenarios.result import Latency, ScenarioResult
from accelrt.scenarios.scenario import Effort, MultiStream, Offline, Scenario, Server, SingleStream

__all__ = [
    "DriverName",
    "Effort",
    "Latency",
    "MultiStream",
    "Offline",
    "Scenario",
    "ScenarioResult",
    "Server",
    "SingleStream",
    "Sweep",
    "SweepStep",
    "measure",
    "sweep",
]
