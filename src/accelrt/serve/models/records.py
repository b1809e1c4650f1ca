"""What the service keeps of each model and of each of its versions."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from accelrt.serve.interface import ModelState
from accelrt.serve.models.config import ModelConfig
from accelrt.serve.models.process import IsolatedPredictor
from accelrt.serve.models.repository import RepositoryModel, Stamp
from accelrt.serve.models.served import LiveModel
from accelrt.serve.models.settings import ModelSettings
from accelrt.serve.models.statistics import VersionStatistics
from accelrt.serve.models.uploads import UploadedFiles


@dataclass(frozen=True, slots=True)
class Plan:
    """What a version is loaded from: equal plans load equal models.

    Attributes:
        settings: The model's, with the server's where it does not say.
        uploads: Keeps files that a client sent.
    """

    path: Path
    stamp: Stamp
    config: ModelConfig | None
    settings: ModelSettings
    uploads: UploadedFiles | None = None


@dataclass(eq=False)
class Slot:
    """One version of a model.

    Attributes:
        live: What answers its requests; None while nothing does.
        token: Names ``live`` to `Residency`.
        predictor: Of ``live``, where it is in a process of its own.
        loading: Done when the load that is under way is; its result is nothing, look at ``live``.
        on_demand: A request loads it, if nothing answers.
        waiters: Requests that wait for it to be loaded.
        failures: Loads on demand that failed in a row.
        retry_at: When the next may be tried, of `time.monotonic`.
        known_bytes: What it held when it was loaded last, 0 if never.
        loads: How often it was loaded.
        proof: Whether its rows are independent, and why; kept between loads of the same plan.
    """

    name: str
    version: str
    plan: Plan
    state: ModelState = "UNAVAILABLE"
    reason: str = ""
    live: LiveModel | None = None
    token: object = None
    predictor: IsolatedPredictor | None = None
    loading: Future[None] | None = None
    on_demand: bool = False
    ever_loaded: bool = False
    waiters: int = 0
    failures: int = 0
    retry_at: float = 0.0
    known_bytes: int = 0
    loads: int = 0
    proof: tuple[bool, str] | None = None
    statistics: VersionStatistics = field(default_factory=VersionStatistics)


@dataclass(eq=False)
class Entry:
    """One model: what lies in the repository, and its versions.

    Attributes:
        wanted: It should be loaded.
        serial: Held while it is loaded or unloaded: one of these at a time.
        uploaded: Its files came with a load request.
        joint: The load that is under way and that others who want the same may wait for.
        pending: Load requests that have it in hand.
    """

    name: str
    found: RepositoryModel | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    wanted: bool = False
    problem: str = ""
    uploaded: bool = False
    serial: threading.Lock = field(default_factory=threading.Lock)
    joint: Future[None] | None = None
    pending: int = 0
