"""Finding backends: what is broken or taken twice is an entry with a reason, and nobody else suffers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

import accelrt
from accelrt.backend import Backend, Device, Status
from accelrt.errors import AccelrtWarning, BackendUnavailable, CoresUnavailable, RegistryError, TargetError
from accelrt.registry import GROUP, REGISTRY, Registry, devices_of, status_of
from accelrt.target import parse
from accelrt.testing.fake import FakeBackend, FakeEngine

Fine = FakeBackend.configured("fine")
Other = FakeBackend.configured("fine", version="other")


class NoBackend:
    name = "fine"


class OldContract(FakeBackend):
    name: ClassVar[str] = "fine"
    api_version: ClassVar[int] = 0


class Distribution:
    def __init__(self, name: str) -> None:
        self.name = name


def point(name: str, value: str, origin: str = "someone") -> EntryPoint:
    found = EntryPoint(name, value, GROUP)
    vars(found)["dist"] = Distribution(origin)
    return found


def registry(*points: EntryPoint) -> Registry:
    return Registry(lambda: points)


HERE = "tests.unit.test_registry"


def test_discovery_loads_nothing() -> None:
    found = registry(point("missing", "no.such.module:Backend"))
    assert found.names() == ("missing",)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no.such.module:Backend", "ModuleNotFoundError"),
        (f"{HERE}:Nothing", "AttributeError"),
        (f"{HERE}:NoBackend", "not a subclass"),
        (f"{HERE}:OldContract", "speaks version 0"),
    ],
)
def test_a_broken_plugin_is_a_status_with_a_reason(value: str, reason: str) -> None:
    found = registry(point("fine", value), point("good", f"{HERE}:Good"))
    with pytest.raises(RegistryError, match=reason):
        found.backend("fine")
    broken = next(plugin for plugin in found.plugins() if plugin.name == "fine")
    assert broken.reason is not None
    assert reason in broken.reason


class Good(FakeBackend):
    name: ClassVar[str] = "good"


def test_the_name_must_be_that_of_the_entry_point() -> None:
    with pytest.raises(RegistryError, match="is named 'fine' but its entry point 'coarse'"):
        registry(point("coarse", f"{HERE}:Fine")).backend("coarse")


def test_of_two_the_bundled_one_wins_with_a_warning() -> None:
    found = registry(point("fine", f"{HERE}:Other", "aaa"), point("fine", f"{HERE}:Fine", "accelrt"))
    with pytest.warns(AccelrtWarning, match=r"'fine' of aaa is ignored.*taken by .*Fine of accelrt"):
        assert type(found.backend("fine")) is Fine
    loser = next(plugin for plugin in found.plugins() if plugin.origin == "aaa")
    assert loser.reason is not None
    assert "taken" in loser.reason


def test_registering_for_this_process() -> None:
    found = registry(point("good", f"{HERE}:Good"))
    found.register(Fine)
    assert type(found.backend("fine")) is Fine
    found.register(Other)  # a notebook's cell is run again
    assert type(found.backend("fine")) is Other
    with pytest.raises(RegistryError, match="belongs to the installed plug-in"):
        found.register(Good)
    found.unregister("fine")
    with pytest.raises(TargetError, match="no backend 'fine'; found: good"):
        found.backend("fine")


@pytest.mark.parametrize("name", ["auto", "Upper", "a/b", "a:b", "", None])
def test_names_that_no_target_can_say_are_refused(name: str | None) -> None:
    cls = type("Odd", (FakeBackend,), {"name": name})
    with pytest.raises(RegistryError):
        registry().register(cls)


def test_candidates_end_with_the_cpu() -> None:
    accelrt.register(FakeBackend.configured("chained"))
    try:
        names = [candidate.name for candidate in REGISTRY.candidates(parse("chained"))]
        assert names == ["chained/fake", "cpu/onnxruntime", "cpu/reference"]
        assert [c.name for c in REGISTRY.candidates(parse("cpu"))] == ["cpu/onnxruntime", "cpu/reference"]
        assert [c.name for c in REGISTRY.candidates(parse("cpu/reference"))] == ["cpu/reference", "cpu/onnxruntime"]
    finally:
        REGISTRY.unregister("chained")


def test_an_unusable_engine_asked_for_by_name_says_what_helps() -> None:
    accelrt.register(FakeBackend.configured("absent", unusable="its SDK is not installed"))
    try:
        for target in ("absent", "absent/fake"):
            with pytest.raises(BackendUnavailable, match=r"SDK is not installed.*pip install the-missing-sdk"):
                REGISTRY.candidates(parse(target))
    finally:
        REGISTRY.unregister("absent")


def test_unknown_engines_and_reserved_names() -> None:
    with pytest.raises(TargetError, match="has no engine 'magic'; it has onnxruntime"):
        REGISTRY.candidates(parse("cpu/magic"))
    with pytest.raises(TargetError, match="stands for a choice"):
        REGISTRY.candidates(parse("auto"))


class Rude(FakeEngine):
    def status(self) -> Status:
        raise OSError("libvendor.so: cannot open")


class RudeBackend(FakeBackend):
    name: ClassVar[str] = "rude"

    def __init__(self) -> None:
        self.engines = (Rude(self.config),)

    def devices(self) -> Sequence[Device]:
        raise OSError("the driver is gone")


def test_an_engine_that_breaks_its_promise_hides_nobody_else() -> None:
    status = status_of(Rude(FakeBackend.config))
    assert not status.usable
    assert "libvendor.so" in str(status.reason)
    accelrt.register(RudeBackend)
    try:
        found = {backend.name: backend for backend in accelrt.backends()}
        assert "the driver is gone" in str(found["rude"].reason)
        assert found["cpu"].usable
        assert [device.name for device in accelrt.devices() if device.backend == "cpu"] == ["cpu:0"]
    finally:
        REGISTRY.unregister("rude")


def test_devices_that_do_not_exist() -> None:
    backend: Backend = FakeBackend.configured("three", devices=3)()
    assert [device.name for device in devices_of(backend, None)] == ["three:0", "three:1", "three:2"]
    assert [device.index for device in devices_of(backend, (2, 0))] == [2, 0]
    with pytest.raises(CoresUnavailable, match=r"no device 5; it has \[0, 1, 2\]"):
        devices_of(backend, (1, 5))
