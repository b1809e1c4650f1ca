"""Which of Amazon's Elastic Inference accelerators this machine has, and whether a client for them is installed.

The client kills its process where it finds none, so nothing of it is ever imported here. Accelerators are listed by the
vendor's tool, ``ei describe-accelerators -j``; where there is no tool, by the banner that the client prints when a
graph of one addition is run in a process of its own. Names of the tool's JSON fields are from the vendor's user guide
as remembered, and were seen nowhere: the reader takes several spellings, and other output as the banner.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelrt.backend import Device, Status
from accelrt_eia.vendor_process import VendorDied, VendorError, VendorProcess

TOOL = "opt/amazon/ei/ei_tools/bin/ei"
VISIBLE = "EI_VISIBLE_DEVICES"
GIB = 1 << 30

MEMORY: Mapping[str, int] = {
    "eia1.medium": 1 * GIB, "eia1.large": 2 * GIB, "eia1.xlarge": 4 * GIB,
    "eia2.medium": 2 * GIB, "eia2.large": 4 * GIB, "eia2.xlarge": 8 * GIB,
}  # fmt: skip
"""Bytes of memory by type, as the vendor's table of accelerator types had them."""

CLOSED = (
    "Amazon took no new customers for Elastic Inference from 2023-04-15 on and has closed the service since, so that "
    "no accelerator can be had any more"
)
INSTEAD = "run the model elsewhere: ACCELRT_BACKEND=cpu, or eia/remote for an accelerator of your own over the network"

_TOOL_S, _PROBE_S = 30.0, 300.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator as its client counts them.

    Attributes:
        ordinal: Counted from 0 among those that the process may see.
        id: ``eia-`` and hexadecimal digits, empty if unknown.
        type: ``eia2.large``; empty if unknown.
        health: ``healthy`` or another word of the vendor's; ``unknown`` where only the banner told.
        origin: What told: ``tool`` or ``banner``.
    """

    ordinal: int
    id: str
    type: str
    health: str
    origin: str

    @property
    def memory_bytes(self) -> int | None:
        """Its memory by its type, None if the type is unknown."""
        return MEMORY.get(self.type.removeprefix("ml."))

    def device(self) -> Device:
        """Return it as a device of the backend ``eia``."""
        return Device(
            "eia",
            self.ordinal,
            f"Elastic Inference accelerator {self.id or self.ordinal} ({self.type or 'unknown type'})",
            self.memory_bytes,
            {
                "nature": "real",
                "accelerator_id": self.id,
                "accelerator_type": self.type,
                "health": self.health,
                "origin": self.origin,
            },
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found; ``problem`` says why there are none."""

    accelerators: tuple[Accelerator, ...] = ()
    problem: str = ""
    client_version: str = ""


@dataclass(frozen=True, slots=True)
class Sdk:
    """One of the vendor's frameworks.

    Attributes:
        kind: As `vendor_side` calls it.
        what: What is installed, in words.
        python: The variable that names the interpreter it is installed for; if unset it is looked for in this one.
    """

    kind: str
    what: str
    python: str

    def interpreter(self) -> str | None:
        """Return the interpreter, None for this one."""
        return os.environ.get(self.python) or None

    def probe(self, root: Path) -> tuple[dict[str, Any], Found]:
        """Return what a child process found out, and the accelerators that the vendor's client finds.

        The first holds versions, ``api`` and what else `vendor_side` says, or ``problem``.

        Args:
            root: Where the file system with the vendor's tool begins.
        """
        process: VendorProcess | None = None
        facts: dict[str, Any] = {}
        try:
            process = VendorProcess(self.interpreter())
            facts = process.call("facts", _PROBE_S, kind=self.kind)[0]
            if os.environ.get(VISIBLE) == "":
                return facts, Found(problem=f"{VISIBLE} is empty, which stands for none")
            if (tool := root / TOOL).is_file():
                return facts, from_tool(tool)
            process.call("try", _PROBE_S, kind=self.kind, ordinal=0)
            return facts, from_banner(process.printed())
        except (VendorError, VendorDied) as error:
            problem = one_line(str(error))
            return facts or {"problem": problem}, Found(problem=problem)
        finally:
            if process is not None:
                process.close()


def status_of(sdk: Sdk, facts: Mapping[str, Any] | None, found: Found | None) -> Status:
    """Return an engine's status.

    Args:
        sdk: What it drives.
        facts: Of `Sdk.probe`, None if nothing is installed.
        found: Likewise; None where no accelerator is needed.
    """
    if facts is None:
        return Status(False, reason=f"{sdk.what} is not installed; {CLOSED}", remedy=INSTEAD)
    if "problem" in facts:
        return Status(False, reason=f"{sdk.what} does not work: {facts['problem']}; {CLOSED}", remedy=INSTEAD)
    version = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    if found is not None and not found.accelerators:
        return Status(False, version, f"no accelerator can be reached: {found.problem}; {CLOSED}", INSTEAD)
    return Status(True, version)


def from_tool(tool: Path) -> Found:
    """Ask the vendor's tool, whose crash is an answer too."""
    try:
        done = subprocess.run(
            [str(tool), "describe-accelerators", "-j"], capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(problem=f"{tool.name} describe-accelerators: {one_line(str(error))}")
    found = from_text(done.stdout)
    if done.returncode != 0 and not found.accelerators:
        said = one_line(done.stderr or done.stdout)
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return Found(problem=f"{tool.name} describe-accelerators ended with {how}: {said or 'it said nothing'}")
    return visible(found, os.environ)


def from_text(text: str) -> Found:
    """Read what the tool printed: JSON, or text like the banner."""
    start = text.find("{")
    try:
        data: Any = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        data = None
    if not isinstance(data, Mapping):
        return replace(from_banner(text), accelerators=tuple(replace(a, origin="tool") for a in _banner_entries(text)))
    entries = data.get("devices") or data.get("acceleratorSet") or data.get("accelerators") or []
    listed = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    found = tuple(_entry(place, entry) for place, entry in enumerate(listed))
    version = str(data.get("ei_client_version", ""))
    return Found(found, "" if found else "the vendor's tool lists none", version)


def _entry(place: int, entry: Mapping[str, Any]) -> Accelerator:
    health = entry.get("status") or entry.get("acceleratorHealth") or "unknown"
    if isinstance(health, Mapping):
        health = health.get("status") or "unknown"
    return Accelerator(
        place,
        str(entry.get("id") or entry.get("acceleratorId") or ""),
        str(entry.get("type") or entry.get("acceleratorType") or ""),
        str(health),
        "tool",
    )


def from_banner(text: str) -> Found:
    """Read the lines that the client prints when it has found its accelerators."""
    found = _banner_entries(text)
    version = re.search(r"Client Library Version:\s*(\S+)", text)
    problem = "" if found else f"the client named none: {one_line(text) or 'it printed nothing'}"
    return Found(found, problem, version.group(1) if version else "")


def _banner_entries(text: str) -> tuple[Accelerator, ...]:
    ids = re.findall(r"Accelerator ID:\s*(eia-[0-9a-f]+)", text)
    types = re.findall(r"Accelerator Type:\s*(\S+)", text)
    count = re.search(r"Number of Elastic Inference Accelerators Available:\s*(\d+)", text)
    number = min(max(len(ids), int(count.group(1)) if count else 0), _MOST)
    return tuple(Accelerator(place, _at(ids, place), _at(types, place), "unknown", "banner") for place in range(number))


_MOST = 64
"""More than any instance had: what stands in a banner is not to be believed beyond it."""


def _at(texts: Sequence[str], place: int) -> str:
    return texts[place] if place < len(texts) else ""


def visible(found: Found, environ: Mapping[str, str]) -> Found:
    """Narrow what the tool lists to what ``EI_VISIBLE_DEVICES`` lets a process see, and count anew as the client does.

    The variable holds ordinals or identifiers, separated by commas; unset it stands for all, empty for none.
    """
    text = environ.get(VISIBLE)
    if text is None:
        return found
    kept = []
    for name in (part.strip() for part in text.split(",")):
        match = [a for a in found.accelerators if name and name in (str(a.ordinal), a.id)]
        if not match and name:
            return Found(problem=f"{VISIBLE} names {name!r}, which is not there", client_version=found.client_version)
        kept += match
    narrowed = tuple(replace(accelerator, ordinal=place) for place, accelerator in enumerate(kept))
    return Found(narrowed, "" if narrowed else f"{VISIBLE} leaves none", found.client_version)


def one_line(text: str) -> str:
    """Return a text in one line, its end where it is long."""
    return " ".join(text.split())[-500:]
