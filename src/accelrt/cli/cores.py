"""``accelrt cores``: which devices there are, in which groups, and who holds them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.common import FAILED, JsonFlag, TracebackFlag, guarded, out, plain_table, print_json, working
from accelrt.nature import mark_of

if TYPE_CHECKING:
    from accelrt.runtime.occupancy import Core, Occupancy

SCOPE = (
    "Sessions are known to the process that loaded them, and this command has loaded none; processes are listed where "
    "the vendor's tool lists them. A program sees its own holds with accelrt.runtime.occupancy.cores()."
)


@guarded
def cores(
    name: Annotated[
        str | None, typer.Argument(help="A backend, or BACKEND/ENGINE; else all backends.", show_default=False)
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option("--emulate", help="Show the cores of this instance, as the backend's emulator has them."),
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Show devices, the groups they are cut into by the environment, their memory, and who holds them.

    Sessions are known to the process that loaded them: this command sees those of no other program. Other processes are
    listed where the vendor's tool lists them, as neuron-ls does.

    Exits with 1 if the backend asked about has no device here.
    """
    if emulate is not None and name is None:
        raise typer.BadParameter("Name the backend whose instance is to be emulated.", param_hint="BACKEND")
    with working(as_json):
        found = _found(name, emulate)
    if as_json:
        print_json({"pid": os.getpid(), "scope": SCOPE, "backends": [_to_json(one) for one in found]})
    else:
        for one in found:
            _show(one)
        out().print(SCOPE, soft_wrap=True)
    if name is not None and not found[0].cores:
        raise typer.Exit(FAILED)


def _found(name: str | None, emulate: str | None) -> tuple[Occupancy, ...]:
    from accelrt.runtime import occupancy

    if name is None:
        return occupancy.all_cores()
    if emulate is None:
        return (occupancy.cores(name),)
    return (occupancy.cores(occupancy.emulator_of(name), {"instance": emulate}),)


def _to_json(one: Occupancy) -> dict[str, Any]:
    return {
        "name": one.name,
        "nature": one.nature,
        "exclusive": one.exclusive,
        "reason": one.reason,
        "cores": [
            {
                "name": core.device.name,
                "description": core.device.description,
                "memory_bytes": core.device.memory_bytes,
                "group": core.group,
                "group_is_whole": core.whole,
                "held_by": list(core.holders),
                "other_processes": list(core.others),
            }
            for core in one.cores
        ],
    }


def _show(one: Occupancy) -> None:
    from accelrt.partition.report import human_bytes

    console = out()
    if one.reason is not None or not one.cores:
        console.print(f"{one.name}: {one.reason or 'no devices here'}\n", soft_wrap=True)
        return
    rule = "one session each" if one.exclusive else "shared by sessions"
    console.print(
        f"{one.name}{mark_of(one.nature)}: {len(one.cores)} device{'s' * (len(one.cores) > 1)}, {rule}", soft_wrap=True
    )
    table = plain_table()
    for heading in ("device", "group", "memory", "held by", "what it is"):
        table.add_column(heading, no_wrap=heading != "what it is", overflow="fold")
    for core in one.cores:
        memory = "?" if core.device.memory_bytes is None else human_bytes(core.device.memory_bytes)
        table.add_row(core.device.name, _group(core), memory, _holders(core), core.device.description)
    console.print(table)
    console.print()


def _group(core: Core) -> str:
    if core.group is None:
        return "none"
    return f"{core.group}, whole" if core.whole else str(core.group)


def _holders(core: Core) -> str:
    return "; ".join((*core.holders, *core.others)) or "-"
