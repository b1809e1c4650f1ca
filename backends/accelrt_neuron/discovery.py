"""Which Neuron chips this machine has, read from its device files and sysfs; the vendor's Python is never imported.

The driver (aws-neuron-driver) makes ``/dev/neuronN`` and, under ``/sys/class/neuron_device/neuronN``,
``info/architecture/{arch_type,instance_type,device_name}``, which everybody may read, and a folder ``neuron_coreK`` a
core. ``core_count`` is for root alone, so the folders are counted. Where sysfs does not tell, ``neuron-ls -j`` may;
then the PCI identifiers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.backend import Device
from accelrt.cores import visible_cores
from accelrt_neuron.catalogue import CHIP_MEMORY, CORES_PER_CHIP, DEFAULT_LNC, Generation

TOOL = "neuron-ls"
_TOOL_FOLDER = "opt/aws/neuron/bin"
_TOOL_S = 20.0

_BY_ARCHITECTURE: Mapping[str, Generation] = {"NDv1": "v1", "NDv2": "v2", "NDv3": "v3"}
_BY_KIND: Mapping[str, Generation] = {"inf1": "v1", "inf2": "v2", "trn1": "v2", "trn2": "v3"}
_CHIP_NAMES: Mapping[str, str] = {
    "inf1": "Inferentia", "inf2": "Inferentia2", "trn1": "Trainium1", "trn2": "Trainium2",
}  # fmt: skip
_PCI_VENDOR = 0x1D0F
_PCI: Mapping[int, str] = {
    0x7064: "inf1", 0x7065: "inf1", 0x7066: "inf1", 0x7067: "inf1", 0x7264: "inf2", 0x7164: "trn1", 0x7364: "trn2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chip:
    """One device of the driver.

    Attributes:
        index: The N of ``/dev/neuronN``.
        kind: ``inf1``, ``inf2``, ``trn1`` or ``trn2``.
        generation: Of its cores.
        name: As the driver names it: ``Inferentia2``.
        cores: Logical cores: what programs are loaded on.
        memory_bytes: Of the whole chip.
        origin: What told: ``sysfs``, ``neuron-ls`` or ``pci``.
    """

    index: int
    kind: str
    generation: Generation
    name: str
    cores: int
    memory_bytes: int
    origin: str


def chips(root: Path = Path("/")) -> tuple[Chip, ...]:
    """Return the chips under a root of the file system, in the driver's order, but for those that nothing tells of."""
    nodes = _device_files(root)
    if not nodes:
        return ()
    found = {chip.index: chip for number in nodes if (chip := _from_sysfs(root, number)) is not None}
    if len(found) < len(nodes):
        for chip in (*_from_tool(root), *_from_pci(root, nodes)):
            if chip.index in nodes:
                found.setdefault(chip.index, chip)
    return tuple(found[number] for number in nodes if number in found)


def devices(root: Path = Path("/")) -> tuple[Device, ...]:
    """Return one device a logical core that this process may use, numbered as the runtime numbers the machine's.

    NEURON_RT_VISIBLE_CORES narrows them; ``visible_index`` in the properties is what the vendor's functions count by.

    Raises:
        OptionError: The variable cannot be read.
        CoresUnavailable: It names cores that are not there.
    """
    every = [(chip, core) for chip in chips(root) for core in range(chip.cores)]
    visible = visible_cores(os.environ, len(every)) if every else ()
    return tuple(_device(index, *every[index], place) for place, index in enumerate(visible))


def _device(index: int, chip: Chip, core: int, place: int) -> Device:
    return Device(
        "neuron",
        index,
        f"NeuronCore-{chip.generation} {core} of {chip.name} {chip.index}",
        chip.memory_bytes // chip.cores,
        {
            "nature": "real",
            "kind": chip.kind,
            "generation": chip.generation,
            "chip": str(chip.index),
            "core": str(core),
            "origin": chip.origin,
            "visible_index": str(place),
        },
    )


def _device_files(root: Path) -> list[int]:
    names = _entries(root / "dev")
    return sorted(int(match.group(1)) for name in names if (match := re.fullmatch(r"neuron(\d+)", name)))


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder, none where it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def sysfs_folder(root: Path, number: int) -> Path | None:
    """Return where the driver describes a device, None where it does not."""
    for parent in ("sys/class/neuron_device", "sys/devices/virtual/neuron_device"):
        if (folder := root / parent / f"neuron{number}").is_dir():
            return folder
    return None


def _from_sysfs(root: Path, number: int) -> Chip | None:
    if (folder := sysfs_folder(root, number)) is None:
        return None
    kind = _read(folder / "info" / "architecture" / "instance_type").lower()
    generation = _BY_ARCHITECTURE.get(_read(folder / "info" / "architecture" / "arch_type")) or _BY_KIND.get(kind)
    if generation is None:
        return None
    name = _read(folder / "info" / "architecture" / "device_name")
    physical = sum(1 for entry in _entries(folder) if re.fullmatch(r"neuron_core\d+", entry))
    physical = physical or CORES_PER_CHIP[generation]
    kind = kind if kind in _BY_KIND else {"v1": "inf1", "v2": "inf2", "v3": "trn2"}[generation]
    cores = max(1, physical // logical_core_size(generation))
    return Chip(number, kind, generation, name or _CHIP_NAMES[kind], cores, CHIP_MEMORY[generation], "sysfs")


def logical_core_size(generation: Generation) -> int:
    """Return how many physical cores make a logical one in this process; NEURON_RT_VIRTUAL_CORE_SIZE has a say."""
    text = os.environ.get("NEURON_RT_VIRTUAL_CORE_SIZE", "")
    return int(text) if text in ("1", "2") else DEFAULT_LNC[generation]


def listing(root: Path = Path("/")) -> list[dict[str, Any]]:
    """Return what ``neuron-ls -j`` says, without the processes that it lists; empty where there is no such tool."""
    # The command lines of processes may hold secrets.
    return [{k: v for k, v in row.items() if k != "neuron_processes"} for row in _full_listing(root)]


def occupants(root: Path = Path("/")) -> dict[int, tuple[str, ...]]:
    """Return which other processes hold something on each core, by index, as ``neuron-ls -j`` has it.

    The tool lists processes by chip and does not say on which of its cores they are, so each stands at every core of
    the chip, and the text says so.
    """
    by_chip: dict[str, tuple[str, ...]] = {}
    for row in _full_listing(root):
        processes = row.get("neuron_processes")
        listed = processes if isinstance(processes, list) else []
        pids = {process.get("pid") for process in listed if isinstance(process, dict)} - {os.getpid()}
        chip = row.get("neuron_device")
        found = tuple(f"process {pid}, on chip {chip}" for pid in sorted(pid for pid in pids if type(pid) is int))
        if found:
            by_chip[str(chip)] = found
    # Numbering cores takes the chips, which are looked for only if somebody holds any.
    known = devices(root) if by_chip else ()
    return {core.index: by_chip[core.properties["chip"]] for core in known if core.properties["chip"] in by_chip}


def _full_listing(root: Path) -> list[dict[str, Any]]:
    own = root / _TOOL_FOLDER / TOOL
    tool = str(own) if own.is_file() else shutil.which(TOOL) if root == Path("/") else None
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, "-j"], capture_output=True, text=True, timeout=_TOOL_S, check=True)
        rows = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, dict)]


def _from_tool(root: Path) -> Sequence[Chip]:
    found = []
    kinds = _pci_kinds(root)
    for row in listing(root):
        try:
            number, cores, memory = int(row["neuron_device"]), int(row["nc_count"]), int(row["memory_size"])
        except (KeyError, TypeError, ValueError):
            continue
        kind = kinds.get(str(row.get("bdf", "")).lower()[-7:]) or _kind_by_shape(cores, memory)
        if kind is not None and cores > 0:
            found.append(Chip(number, kind, _BY_KIND[kind], _CHIP_NAMES[kind], cores, memory, "neuron-ls"))
    return found


def _kind_by_shape(cores: int, memory: int) -> str | None:
    """Tell a chip by its memory: Inf2 and Trn1 are alike and take each other's programs only by name."""
    for kind in ("inf1", "inf2", "trn2"):
        if memory == CHIP_MEMORY[_BY_KIND[kind]]:
            return kind
    return "inf1" if cores == CORES_PER_CHIP["v1"] and memory < CHIP_MEMORY["v2"] else None


def _from_pci(root: Path, numbers: Sequence[int]) -> Sequence[Chip]:
    """Return chips by their PCI identifiers, which say what there is but not which device file it is."""
    kinds = list(_pci_kinds(root).values())
    if len(kinds) != len(numbers) or len(set(kinds)) != 1:
        return ()
    kind = kinds[0]
    generation = _BY_KIND[kind]
    cores = CORES_PER_CHIP[generation] // logical_core_size(generation)
    return [Chip(n, kind, generation, _CHIP_NAMES[kind], cores, CHIP_MEMORY[generation], "pci") for n in numbers]


def _pci_kinds(root: Path) -> dict[str, str]:
    """Return the kind of each Neuron chip on the PCI bus, by bus, device and function: ``00:1e.0``."""
    folder = root / "sys" / "bus" / "pci" / "devices"
    kinds = {}
    for address in _entries(folder):
        try:
            vendor = int(_read(folder / address / "vendor") or "0", 16)
            device = int(_read(folder / address / "device") or "0", 16)
        except ValueError:
            continue
        if vendor == _PCI_VENDOR and device in _PCI:
            kinds[address.lower()[-7:]] = _PCI[device]
    return kinds


def instance_type(root: Path = Path("/")) -> str:
    """Return the instance's type as the firmware names it, empty where it does not: ``inf2.xlarge``."""
    return _read(root / "sys" / "devices" / "virtual" / "dmi" / "id" / "product_name")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
