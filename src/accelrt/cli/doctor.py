"""``accelrt doctor``: what is usable on this machine, and if not, why, and what to do."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.common import FAILED, JsonFlag, TracebackFlag, guarded, out, plain_table, print_json, working
from accelrt.errors import AccelrtError, AccelrtWarning

if TYPE_CHECKING:
    from rich.console import RenderableType

    from accelrt.inventory import BackendInfo, EngineInfo
    from accelrt.target import Target


@guarded
def doctor(
    name: Annotated[
        str | None, typer.Argument(help="A backend or engine to check: cpu, cpu/openvino.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write everything the doctor knows to a JSON file, without secrets.", metavar="FILE"
        ),
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Show every backend and engine: version and devices, or why it is not usable and what to do about it.

    With --report, what is known of all of them also goes to a file, to be sent to somebody who cannot see this machine.

    Exits with 1 if the backend or engine asked about is unknown or not usable, or if nothing at all is.
    """
    from accelrt.target import parse

    target = None if name is None else parse(name)
    with working(as_json):
        found = _inventory()
    chosen = [info for info in found if target is None or info.name == target.backend]
    problem = _problem(target, chosen, found)
    if report is not None:
        from accelrt.cli.report import write_report

        with working(as_json):
            known = {**_surroundings(), "backends": [_to_json(info) for info in found], "problem": problem}
            write_report(report, known)
    if as_json:
        print_json({**_surroundings(), "backends": [_to_json(info) for info in chosen], "problem": problem})
    else:
        _show(name, chosen, problem)
        if report is not None:
            out().print(f"\nThe report is in {report}.", soft_wrap=True)
    if problem:
        raise typer.Exit(FAILED)


def _inventory() -> tuple[BackendInfo, ...]:
    from accelrt.inventory import backends

    with warnings.catch_warnings():
        # A duplicate plug-in warns when it is found; here it is listed with its reason.
        warnings.simplefilter("ignore", AccelrtWarning)
        return backends()


def _problem(target: Target | None, chosen: list[BackendInfo], found: tuple[BackendInfo, ...]) -> str | None:
    """Return why what was asked about is not usable, None if it is."""
    if target is None:
        return None if any(info.usable for info in found) else "No engine is usable here."
    if not chosen:
        return f"There is no backend {target.backend!r}; found: {', '.join(sorted({i.name for i in found})) or 'none'}."
    # A name may have several entries: the plug-in in use, and duplicates with their reasons.
    info = next((info for info in chosen if info.reason is None), chosen[0])
    if info.reason is not None:
        return f"The backend {info.name!r} cannot be used: {info.reason}"
    if target.engine is not None:
        return _engine_problem(target.engine, info)
    usable = [engine for engine in info.engines if engine.status.usable]
    if not usable:
        return f"No engine of the backend {info.name!r} is usable here."
    if all(engine.nature == "emulated" for engine in usable):
        named = ", ".join(f"{info.name}/{engine.name}" for engine in usable)
        return f"Of the backend {info.name!r} only an emulator is usable here, and it must be named: {named}."
    if missing := sorted(set(target.devices or ()) - {device.index for device in info.devices}):
        return f"The backend {info.name!r} has no device {missing[0]}."
    return None


def _engine_problem(name: str, info: BackendInfo) -> str | None:
    engine = next((engine for engine in info.engines if engine.name == name), None)
    if engine is None:
        names = ", ".join(engine.name for engine in info.engines)
        return f"The backend {info.name!r} has no engine {name!r}; it has {names}."
    if engine.status.usable:
        return None
    remedy = f" Try: {engine.status.remedy}" if engine.status.remedy else ""
    return f"The engine {info.name}/{name} is not usable here: {engine.status.reason or 'no reason given'}.{remedy}"


def _surroundings() -> dict[str, Any]:
    import accelrt
    from accelrt.artifact.cache import cache_folder

    return {
        "accelrt": accelrt.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cache": str(cache_folder()),
        "default": _default()[1],
    }


def _default() -> tuple[str, str]:
    """Return the target that applies when none is given and the engine that it stands for, or the reason for none."""
    from accelrt.registry import REGISTRY
    from accelrt.target import requested

    try:
        target = requested(None)
        return str(target), REGISTRY.candidates(target)[0].name
    except AccelrtError as error:
        return "ACCELRT_BACKEND", error.message


def _to_json(info: BackendInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "origin": info.origin,
        "usable": info.usable,
        "reason": info.reason,
        "engines": [
            {
                "name": engine.name,
                "target": f"{info.name}/{engine.name}",
                "usable": engine.status.usable,
                "version": engine.status.version,
                "reason": engine.status.reason,
                "remedy": engine.status.remedy,
                "nature": engine.nature,
                "default_precision": engine.default_precision,
                "formats": list(engine.formats),
            }
            for engine in info.engines
        ],
        "devices": [
            {
                "name": device.name,
                "description": device.description,
                "memory_bytes": device.memory_bytes,
                "properties": dict(device.properties),
            }
            for device in info.devices
        ],
    }


def _show(name: str | None, chosen: list[BackendInfo], problem: str | None) -> None:
    from rich.text import Text

    console = out()
    facts = _surroundings()
    console.print(f"accelrt {facts['accelrt']}, Python {facts['python']}, {facts['platform']}")
    target, engine = _default()
    console.print(f"default target: {target} ({engine})\ncompile cache: {facts['cache']}")
    for info in chosen:
        console.print()
        for part in _describe(info):
            console.print(part)
    if problem or name is not None:
        verdict = Text(problem, style="bold red") if problem else Text(f"{name} is usable.", style="green")
        console.print()
        console.print(verdict, soft_wrap=True)


def _describe(info: BackendInfo) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    from accelrt.partition.report import human_bytes

    heading = Text.assemble((info.name, "bold"), f"  (from {info.origin})")
    if info.reason is not None:
        heading.append("  not used: ", style="red").append(info.reason)
        return [heading]
    parts: list[RenderableType] = [heading]
    for device in info.devices:
        memory = f", {human_bytes(device.memory_bytes)}" if device.memory_bytes is not None else ""
        parts.append(f"  {device.name}  {device.description}{memory}")
    if not info.devices:
        # What compiles without a device is a compiler that is here, and an engine without one is not usable.
        able = any(engine.status.usable for engine in info.engines)
        parts.append(
            Text(f"  no devices here{': models can be compiled for it, but not run' if able else ''}", style="yellow")
        )
    return [*parts, Padding(_engine_table(info.engines), (0, 0, 0, 2))]


def _engine_table(engines: tuple[EngineInfo, ...]) -> RenderableType:
    from rich.text import Text

    table = plain_table()
    for heading in ("engine", "usable"):
        table.add_column(heading, no_wrap=True)
    table.add_column("version, or what is missing", overflow="fold")
    for engine in engines:
        status = engine.status
        if status.usable:
            mark, details = (
                Text("yes", style="green"),
                Text(f"{status.version or 'version unknown'}, {engine.default_precision}"),
            )
        else:
            mark, details = Text("no", style="red"), Text(status.reason or "no reason given")
            if status.remedy:
                details.append("\ntry: ").append(status.remedy, style="bold")
        if not engine.takes_onnx:
            details.append(f"\ntakes models whole: {', '.join(engine.formats)}")
        if engine.nature != "real":
            details.append(f"\n{engine.nature}: computes on the CPU in the name of other hardware", style="yellow")
        table.add_row(engine.name, mark, details)
    return table
