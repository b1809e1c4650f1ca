"""Who holds which core: in this process by its sessions, elsewhere by what the vendor's tool tells; and the verb."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import accelrt
from accelrt.backend import Backend
from accelrt.cli import app
from accelrt.data import digits_model
from accelrt.errors import CoresUnavailable, OptionError, TargetError
from accelrt.registry import REGISTRY
from accelrt.runtime.occupancy import all_cores, cores, emulator_of
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import mlp
from accelrt_neuron import NeuronBackend
from accelrt_neuron.catalogue import INSTANCES
from accelrt_neuron.discovery import occupants

SIX = {"instance": "inf1.6xlarge"}


@pytest.fixture
def npu() -> Iterator[type[Backend]]:
    """Eight exclusive devices that obey Neuron's variables."""
    yield accelrt.register(FakeBackend.configured("npu", devices=8, exclusive=True, neuron_variables=True))
    REGISTRY.unregister("npu")


@pytest.fixture
def neuron() -> Iterator[None]:
    """The backend of Neuron, registered unless it is installed."""
    present = "neuron" in REGISTRY.names()
    if not present:
        accelrt.register(NeuronBackend)
    yield
    if not present:
        REGISTRY.unregister("neuron")


def test_sessions_are_seen_until_they_are_closed(npu: type[Backend]) -> None:
    artifact = accelrt.compile(digits_model(), "npu")
    with accelrt.load(artifact, devices="2-3"), accelrt.load(artifact):
        held = {core.device.index: core.holders for core in cores("npu").cores}
        assert {index for index, holders in held.items() if holders} == {0, 2, 3}
        assert held[2] == held[3] != held[0]
        assert all("(npu)" in holders[0] and holders[0].startswith("session ") for holders in held.values() if holders)
    assert not any(core.holders for core in cores("npu").cores)


def test_devices_that_are_shared_list_every_session() -> None:
    with accelrt.load(digits_model()), accelrt.load(digits_model()):
        (core,) = cores("cpu").cores
        assert len(core.holders) >= 2
        assert not cores("cpu").exclusive


def test_groups_are_those_that_sessions_take(npu: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(core.group, core.whole) for core in cores("npu").cores] == [(0, False)] * 8
    monkeypatch.setenv("NEURONCORE_GROUP_SIZES", "3,1,2")
    table = cores("npu").cores
    assert [core.group for core in table] == [0, 0, 0, 1, 2, 2, None, None]
    with accelrt.load(digits_model(), backend="npu"):
        # One copy takes the whole of the first group, though it needs one device.
        assert [bool(core.holders) for core in cores("npu").cores] == [True] * 3 + [False] * 5


def test_an_emulated_instance_has_holders_of_its_own(neuron: None) -> None:
    artifact = accelrt.compile(mlp(batch=1), "neuron/emulator", options=SIX)
    with accelrt.load(artifact, devices="4-5"):
        found = cores("neuron/emulator", SIX)
        assert (found.name, found.nature, found.exclusive, len(found.cores)) == (
            "neuron/emulator",
            "emulated",
            True,
            16,
        )
        assert [core.device.index for core in found.cores if core.holders] == [4, 5]
        other = cores("neuron/emulator", {"instance": "inf2.48xlarge"})
        assert not any(core.holders for core in other.cores)


def test_a_target_narrows_the_list_and_must_exist(npu: type[Backend], neuron: None) -> None:
    assert [core.device.index for core in cores("npu:1,5").cores] == [1, 5]
    with pytest.raises(CoresUnavailable):
        cores("npu:8")
    with pytest.raises(TargetError, match="belong to an engine"):
        cores("neuron", SIX)
    with pytest.raises(OptionError, match="no option 'colour'"):
        cores("neuron/emulator", {"colour": "red"})
    assert emulator_of("neuron:0-1") == "neuron/emulator:0,1"
    for target in ("cpu", "neuron/torch-neuronx"):
        with pytest.raises(TargetError, match=r"no emulator|There is no"):
            emulator_of(target)


def test_one_backend_that_fails_hides_nobody(npu: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Backend) -> None:
        raise RuntimeError("the driver is upset")

    monkeypatch.setattr(npu, "devices", broken)
    found = {one.name: one for one in all_cores()}
    assert found["npu"].reason == "RuntimeError: the driver is upset"
    assert found["cpu"].reason is None and found["cpu"].cores


def _machine(root: Path, processes: dict[int, list[dict[str, object]]]) -> None:
    """An inf1.6xlarge without sysfs, whose ``neuron-ls`` lists processes by chip."""
    one = INSTANCES["inf1.6xlarge"]
    rows = [
        {
            "neuron_device": number, "bdf": f"{number:02x}:1e.0", "connected_to": [], "nc_count": 4,
            "memory_size": one.core_memory * 4, "neuron_processes": processes.get(number, []),
        }
        for number in range(one.chips)
    ]  # fmt: skip
    (root / "dev").mkdir()
    for number in range(one.chips):
        (root / "dev" / f"neuron{number}").touch()
    tool = root / "opt" / "aws" / "neuron" / "bin" / "neuron-ls"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(rows)}\nEND\n")
    tool.chmod(0o755)


def test_other_processes_are_those_of_the_vendors_tool(tmp_path: Path) -> None:
    secret = {"command": "serve --token=secret", "neuron_runtime_version": "2.0.0"}
    own = {"pid": os.getpid(), **secret}
    _machine(tmp_path, {1: [{"pid": 4242, **secret}, own], 3: [own]})
    found = NeuronBackend(tmp_path).occupants()
    assert found == occupants(tmp_path)
    assert set(found) == {4, 5, 6, 7}, "the four cores of chip 1; the process itself is no other one"
    assert set(found.values()) == {("process 4242, on chip 1",)}
    assert "secret" not in str(found)


def test_no_tool_and_odd_rows_are_no_error(tmp_path: Path) -> None:
    assert occupants(tmp_path) == {}
    _machine(tmp_path, {0: [{"pid": "x"}, {}], 1: "none", 2: [7]})  # type: ignore[dict-item,list-item]
    assert occupants(tmp_path) == {}


def test_the_verb_shows_other_processes(npu: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "occupants", lambda self: {6: ("process 4242",)})
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "4-7")
    text = CliRunner().invoke(app, ["cores", "npu"], env={"COLUMNS": "120"}).output
    (line,) = (line for line in text.splitlines() if line.startswith("npu:6"))
    assert "process 4242" in line and line.split()[1] == "0"
    assert [line.split()[1] for line in text.splitlines() if line.startswith("npu:")][:5] == [
        "8",
        "none",
        "none",
        "none",
        "none",
    ]
    assert "this command has loaded none" in " ".join(text.split())


def test_the_verb_in_json_and_its_exit_codes(neuron: None) -> None:
    run = CliRunner().invoke
    done = run(app, ["cores", "neuron", "--emulate", "inf1.xlarge", "--json"], env={"NEURONCORE_GROUP_SIZES": "2,1"})
    (one,) = json.loads(done.stdout)["backends"]
    assert (one["name"], one["nature"], one["exclusive"]) == ("neuron/emulator", "emulated", True)
    assert [core["group"] for core in one["cores"]] == [0, 0, 1, None]
    assert one["cores"][0]["memory_bytes"] == INSTANCES["inf1.xlarge"].core_memory
    assert run(app, ["cores"]).exit_code == 0
    assert run(app, ["cores", "--emulate", "inf1.xlarge"]).exit_code == 2
    assert run(app, ["cores", "neuron", "--emulate", "inf9"]).exit_code == 3
    assert run(app, ["cores", "neuron"], env={"NEURON_RT_VISIBLE_CORES": ""}).exit_code == (
        0 if NeuronBackend().devices() else 1
    )
