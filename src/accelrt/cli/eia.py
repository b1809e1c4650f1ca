"""``accelrt eia describe``: accelerators over the network, as the tool of Amazon's Elastic Inference listed them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from accelrt.cli.common import FAILED, JsonFlag, TracebackFlag, guarded, out, print_json, working

if TYPE_CHECKING:
    from accelrt.backend import Device

NAME = "eia"

app = typer.Typer(no_args_is_help=True, help="Accelerators that are reached over a network.")


@app.callback()
def _eia() -> None:
    """Accelerators that are reached over a network."""


@app.command()
@guarded
def describe(as_json: JsonFlag = False, traceback: TracebackFlag = False) -> None:
    """List the accelerators with type, health and memory, as ``ei describe-accelerators`` did.

    Those are the endpoints that ACCELRT_EIA_ACCELERATORS names, and the accelerators that a client of Amazon's sees.

    Exits with 1 if there is none.
    """
    with working(as_json):
        problem, found, now = _found()
    if as_json:
        print_json(
            {
                "time": _now(),
                "attached_accelerators": sum(len(devices) for devices in found.values()),
                "reason": problem,
                "devices": [_to_json(engine, one, now) for engine, devices in found.items() for one in devices],
            }
        )
    else:
        _show(problem, found, now)
    if not any(found.values()):
        raise typer.Exit(FAILED)


def _found() -> tuple[str | None, dict[str, list[Device]], dict[int, Mapping[str, Any]]]:
    """Return why the backend cannot be asked, None if it can, its devices by who runs on them, and endpoints as now."""
    from accelrt.errors import RegistryError, TargetError
    from accelrt.inventory import backend as backend_info
    from accelrt.registry import REGISTRY

    info = backend_info(NAME)
    if info is None:
        return f"There is no backend {NAME!r} in this installation.", {}, {}
    found = {NAME: list(info.devices)}
    try:
        backend = REGISTRY.backend(NAME)
    except (RegistryError, TargetError) as error:
        return str(error), found, {}
    seen: list[Device] = []
    reasons = [info.reason] if info.reason else []
    for engine, said in zip(backend.engines, info.engines, strict=True):
        own = engine.devices()
        if own is None:
            continue
        # Two frameworks of Amazon's see the same ones; other engines' devices are none of a network's.
        fresh = [device for device in own if "accelerator_type" in device.properties and device not in seen]
        seen += fresh
        if fresh:
            found[f"{NAME}/{engine.name}"] = fresh
        if not own and said.status.reason and not said.status.usable:
            reasons.append(f"{NAME}/{engine.name}: {said.status.reason}")
    if not info.devices:
        reasons.insert(0, "ACCELRT_EIA_ACCELERATORS names no endpoint")
    now = {int(one["ordinal"]): one for one in backend.report().get("accelerators", ())}
    return "; ".join(reasons) or None, found, now


def _type_of(device: Device) -> str:
    address = device.properties.get("address", "")
    return device.properties.get("accelerator_type") or device.description.removeprefix(f"{address}, ")


def _to_json(engine: str, device: Device, now: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    properties = device.properties
    told = now.get(device.index, {}) if engine == NAME else {}
    return {
        "ordinal": device.index,
        "of": engine,
        "type": _type_of(device),
        "id": properties.get("accelerator_id") or properties.get("address") or device.name,
        "status": told.get("health") or properties.get("health") or "unknown",
        "memory_bytes": device.memory_bytes,
        "free_bytes": told.get("free_bytes"),
        "accelerator": told.get("accelerator"),
        "slices": told.get("slices"),
        "holders": told.get("holders"),
        "properties": dict(properties),
    }


def _now() -> str:
    return time.strftime("%a %b %e %H:%M:%S %Y")


def _show(problem: str | None, found: dict[str, list[Device]], now: Mapping[int, Mapping[str, Any]]) -> None:
    from accelrt.partition.report import human_bytes

    console = out()
    console.print(f"Time: {_now()}", highlight=False)
    console.print(f"Attached accelerators: {sum(len(devices) for devices in found.values())}", highlight=False)
    for engine, devices in found.items():
        for device in devices:
            entry = _to_json(engine, device, now)
            memory = "unknown" if device.memory_bytes is None else human_bytes(device.memory_bytes)
            if entry["free_bytes"] is not None:
                memory += f", {human_bytes(entry['free_bytes'])} free"
            lines = [("Type", entry["type"]), ("Id", entry["id"]), ("Status", entry["status"]), ("Memory", memory)]
            if entry["holders"] is not None:
                lines.append(("Slice of", entry["accelerator"]))
                lines.append(("Lent", f"{len(entry['holders'])} of {entry['slices']} slices"))
                lines += [
                    ("Holder", f"{one['id']}, {one['programs']} programs, {human_bytes(one['held_bytes'])}")
                    for one in entry["holders"]
                ]
            console.print(f"Device {device.index} ({engine}):", highlight=False)
            for name, value in lines:
                console.print(f"    {name}: {value}", highlight=False, markup=False, soft_wrap=True)
    if problem is not None and not any(found.values()):
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
