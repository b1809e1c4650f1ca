"""Devices from a tree of the driver's files, as each instance has it; nothing of the vendor's is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from accelrt.errors import CoresUnavailable, OptionError
from accelrt_neuron import NeuronBackend
from accelrt_neuron.catalogue import CORES_PER_CHIP, GIB, INSTANCES, Instance
from accelrt_neuron.discovery import chips, devices

NAMES = {"inf1": "Inferentia", "inf2": "Inferentia2", "trn1": "Trainium1", "trn1n": "Trainium1", "trn2": "Trainium2"}
ARCHITECTURES = {"v1": "NDv1", "v2": "NDv2", "v3": "NDv3"}
PCI = {"inf1": 0x7064, "inf2": 0x7264, "trn1": 0x7164, "trn1n": 0x7164, "trn2": 0x7364}

# From the vendor's hardware pages, by hand: chips, logical cores, GiB of device memory in all.
FIGURES = {
    "inf1.xlarge": (1, 4, 8), "inf1.2xlarge": (1, 4, 8), "inf1.6xlarge": (4, 16, 32), "inf1.24xlarge": (16, 64, 128),
    "inf2.xlarge": (1, 2, 32), "inf2.8xlarge": (1, 2, 32), "inf2.24xlarge": (6, 12, 192),
    "inf2.48xlarge": (12, 24, 384), "trn1.2xlarge": (1, 2, 32), "trn1.32xlarge": (16, 32, 512),
    "trn1n.32xlarge": (16, 32, 512), "trn2.48xlarge": (16, 64, 1536),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_VIRTUAL_CORE_SIZE"):
        monkeypatch.delenv(name, raising=False)


def tree(root: Path, instance: Instance, *, sysfs: bool = True, pci: bool = False) -> Path:
    """Lay out the files of an instance: device files, the driver's sysfs and the PCI bus."""
    (root / "dev").mkdir(parents=True)
    for other in ("null", "neuron", "neuron_fake", "nvme0"):
        (root / "dev" / other).touch()
    for number in range(instance.chips):
        (root / "dev" / f"neuron{number}").touch()
        if sysfs:
            folder = root / "sys" / "devices" / "virtual" / "neuron_device" / f"neuron{number}"
            about = folder / "info" / "architecture"
            about.mkdir(parents=True)
            (about / "arch_type").write_text(ARCHITECTURES[instance.generation] + "\n")
            (about / "instance_type").write_text(instance.target.removesuffix("n").capitalize() + "\n")
            (about / "device_name").write_text(NAMES[instance.target] + "\n")
            (folder / "stats").mkdir()
            for core in range(CORES_PER_CHIP[instance.generation]):
                (folder / f"neuron_core{core}" / "stats" / "memory_usage").mkdir(parents=True)
            links = root / "sys" / "class" / "neuron_device"
            links.mkdir(parents=True, exist_ok=True)
            (links / f"neuron{number}").symlink_to(folder)
        if pci:
            place = root / "sys" / "bus" / "pci" / "devices" / f"0000:{number:02x}:1e.0"
            place.mkdir(parents=True)
            (place / "vendor").write_text("0x1d0f\n")
            (place / "device").write_text(f"{PCI[instance.target]:#06x}\n")
    return root


def tool(root: Path, text: str, *, code: int = 0) -> None:
    """Put a neuron-ls into the tree that prints a text."""
    path = root / "opt" / "aws" / "neuron" / "bin" / "neuron-ls"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ['-j']\nprint({text!r})\nsys.exit({code})\n"
    )
    path.chmod(0o755)


@pytest.mark.parametrize("name", INSTANCES)
def test_every_instance_has_its_devices_cores_and_memory(tmp_path: Path, name: str) -> None:
    number, cores, memory = FIGURES[name]
    found = devices(tree(tmp_path, INSTANCES[name]))
    assert len(found) == cores
    assert [device.index for device in found] == list(range(cores))
    assert len({device.properties["chip"] for device in found}) == number
    assert sum(device.memory_bytes or 0 for device in found) == memory * GIB
    assert {device.properties["origin"] for device in found} == {"sysfs"}
    assert found[0].properties["kind"] == INSTANCES[name].target.removesuffix("n")
    assert NAMES[INSTANCES[name].target] in found[-1].description


def test_the_catalogue_is_what_the_vendors_pages_say() -> None:
    for name, (number, cores, memory) in FIGURES.items():
        one = INSTANCES[name]
        assert (one.chips, one.cores, one.cores * one.core_memory) == (number, cores, memory * GIB)


@pytest.mark.parametrize("name", ["inf1.6xlarge", "inf2.24xlarge", "trn2.48xlarge"])
def test_without_sysfs_the_vendors_tool_tells(tmp_path: Path, name: str) -> None:
    one = INSTANCES[name]
    rows = [
        {
            "neuron_device": number, "bdf": f"{number:02x}:1e.0", "cpu_affinity": "0-7", "numa_node": "0",
            "connected_to": [], "nc_count": one.cores_per_chip,
            "memory_size": one.core_memory * one.cores_per_chip,
            "neuron_processes": [{"pid": 1, "command": "serve --token=secret"}],
        }
        for number in range(one.chips)
    ]  # fmt: skip
    tree(tmp_path, one, sysfs=False, pci=True)
    tool(tmp_path, json.dumps(rows))
    found = devices(tmp_path)
    assert len(found) == one.cores
    assert {device.properties["origin"] for device in found} == {"neuron-ls"}
    assert {device.properties["kind"] for device in found} == {one.target}
    report = json.dumps(NeuronBackend(tmp_path).report())
    assert "secret" not in report
    assert "memory_size" in report


@pytest.mark.parametrize(
    "text, code", [("no json", 0), ("[]", 0), ('{"error": 1}', 0), ('[{"nc_count": "x"}]', 0), ("", 1)]
)
def test_a_tool_that_fails_is_no_error(tmp_path: Path, text: str, code: int) -> None:
    tree(tmp_path, INSTANCES["inf2.xlarge"], sysfs=False)
    tool(tmp_path, text, code=code)
    assert devices(tmp_path) == ()


def test_the_pci_bus_tells_when_nothing_else_does(tmp_path: Path) -> None:
    found = chips(tree(tmp_path, INSTANCES["trn1.32xlarge"], sysfs=False, pci=True))
    assert [(chip.kind, chip.cores, chip.origin) for chip in found] == [("trn1", 2, "pci")] * 16


def test_a_machine_without_the_driver_has_none(tmp_path: Path) -> None:
    assert devices(tmp_path) == ()
    (tmp_path / "dev").mkdir()
    assert devices(tmp_path) == ()


def test_numbers_are_those_of_the_device_files(tmp_path: Path) -> None:
    """A container sees some of them."""
    tree(tmp_path, INSTANCES["inf1.24xlarge"])
    for number in (*range(3), *range(5, 16)):
        (tmp_path / "dev" / f"neuron{number}").unlink()
    assert [chip.index for chip in chips(tmp_path)] == [3, 4]
    assert [device.properties["chip"] for device in devices(tmp_path)] == ["3"] * 4 + ["4"] * 4


def test_logical_cores_follow_the_runtimes_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, INSTANCES["trn2.48xlarge"])
    assert len(devices(tmp_path)) == 64
    monkeypatch.setenv("NEURON_RT_VIRTUAL_CORE_SIZE", "1")
    assert len(devices(tmp_path)) == 128


@pytest.mark.parametrize(
    "text, wanted", [("5", [5]), ("4-7", [4, 5, 6, 7]), ("3,4,5", [3, 4, 5]), ("1-2, 3", [1, 2, 3])]
)
def test_visible_cores_narrow_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: list[int]
) -> None:
    tree(tmp_path, INSTANCES["inf1.6xlarge"])
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", text)
    found = devices(tmp_path)
    assert [device.index for device in found] == wanted
    assert [device.properties["visible_index"] for device in found] == [str(i) for i in range(len(wanted))]


@pytest.mark.parametrize("text", ["3,5,6", "6-4", "16", "0-16", "all", "1,,2", "2,1"])
def test_visible_cores_that_the_runtime_refuses_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    tree(tmp_path, INSTANCES["inf1.6xlarge"])
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", text)
    with pytest.raises((CoresUnavailable, OptionError), match="NEURON_RT_VISIBLE_CORES"):
        devices(tmp_path)


def test_looking_imports_nothing_of_the_vendors(tmp_path: Path) -> None:
    tree(tmp_path, INSTANCES["inf2.xlarge"])
    code = (
        "import sys; from pathlib import Path; from accelrt_neuron import NeuronBackend;"
        "assert len(NeuronBackend(Path(sys.argv[1])).devices()) == 2;"
        "print([m for m in ('torch', 'torch_neuronx', 'torch_neuron', 'tensorflow', 'onnxruntime', 'onnx') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True).strip() == "[]"


def test_the_report_holds_what_the_driver_says(tmp_path: Path) -> None:
    tree(tmp_path, INSTANCES["inf2.xlarge"])
    (tmp_path / "sys" / "devices" / "virtual" / "dmi" / "id").mkdir(parents=True)
    (tmp_path / "sys" / "devices" / "virtual" / "dmi" / "id" / "product_name").write_text("inf2.xlarge\n")
    report = json.loads(json.dumps(NeuronBackend(tmp_path).report()))
    assert report["instance_type"] == "inf2.xlarge"
    assert report["sysfs"]["neuron0"]["arch_type"] == "NDv2"
    assert "neuron_core1" in report["sysfs"]["neuron0"]["entries"]
    assert report["packages"]["torch-neuronx"] is None
