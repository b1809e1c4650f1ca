"""What the vendor's compiler flags ask for, in accelrt's words: a precision and options of the engine.

Defaults are the vendor's: neuronx-cc casts nothing since SDK 2.27, neuron-cc casts everything to bfloat16, and
TensorFlow 2 the operands of products to float16.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelrt.backend import Precision

_CASTS: Mapping[str, tuple[Precision, str]] = {
    "all": ("bf16", "all"),
    "all-fp16": ("fp16", "all"),
    "matmult": ("bf16", "matmult"),
    "matmult-bf16": ("bf16", "matmult"),
    "matmult-fp16": ("fp16", "matmult"),
}
"""neuron-cc's ``--fp32-cast``; ``--fast-math`` has the same words behind ``fp32-cast-``."""

_PLAIN = {
    "--target": "target",
    "--model-type": "model_type",
    "--optlevel": "optlevel",
    "-O": "optlevel",
    "--logical-nc-config": "lnc",
    "-lnc": "lnc",
}
_NUMBERS = frozenset({"optlevel", "lnc"})


@dataclass(frozen=True, slots=True)
class Flags:
    """What flags ask for.

    Attributes:
        precision: What to compute in.
        options: Options of an engine, by name; whoever has them takes them.
        rest: Flags that have no counterpart, as they were given.
    """

    precision: Precision
    options: Mapping[str, Any] = field(default_factory=dict)
    rest: tuple[str, ...] = ()


def neuronx_flags(arguments: str | Sequence[str] | None) -> Flags:
    """Read the arguments of neuronx-cc.

    Raises:
        ValueError: A flag that is known has a value that is not.
    """
    what, kind = "none", "bf16"
    options: dict[str, Any] = {}
    rest: list[str] = []
    for name, values in _pairs(arguments):
        if name == "--auto-cast":
            what = _one(name, values, ("none", "matmult", "all"))
        elif name == "--auto-cast-type":
            kind = _one(name, values, ("bf16", "fp16", "tf32", "fp8_e4m3"))
        elif name in _PLAIN:
            option, value = _PLAIN[name], _one(name, values)
            options[option] = _number(name, value) if option in _NUMBERS else value
        else:
            rest += [name, *values]
    if what == "none":
        return Flags("fp32", options, tuple(rest))
    if what == "matmult":
        options["auto_cast"] = what
    if kind in ("tf32", "fp8_e4m3"):
        options["auto_cast_type"] = kind
    return Flags("fp16" if kind == "fp16" else "bf16", options, tuple(rest))


def neuron_cc_flags(arguments: str | Sequence[str] | None, default: str = "all") -> Flags:
    """Read the arguments of neuron-cc; ``default`` is the ``--fp32-cast`` where none is given.

    Raises:
        ValueError: A flag that is known has a value that is not.
    """
    fast: str | None = None
    forced: str | None = None
    options: dict[str, Any] = {}
    rest: list[str] = []
    for name, values in _pairs(arguments):
        if name == "--fp32-cast":
            forced = _one(name, values, tuple(_CASTS))
        elif name == "--fast-math":
            fast = _fast_math(values)
        elif name in ("--neuroncore-pipeline-cores", "--num-neuroncores"):
            options["pipeline_cores"] = _number(name, _one(name, values))
        elif name == "--dynamic-batch-size":
            options["dynamic_batch"] = True
        else:
            rest += [name, *values]
    # By the vendor's documentation --fp32-cast is deprecated, and overrules --fast-math where it is present.
    precision, what = _CASTS[forced or fast or default]
    if what == "matmult":
        options["auto_cast"] = what
    return Flags(precision, options, tuple(rest))


def _fast_math(values: Sequence[str]) -> str:
    for value in values:
        if value in ("all", "none"):
            return "all" if value == "all" else "matmult-bf16"
        if value.startswith("fp32-cast-"):
            return _one("--fast-math", (value.removeprefix("fp32-cast-"),), tuple(_CASTS))
        if value not in ("fast-relayout", "no-fast-relayout"):
            raise ValueError(f"--fast-math does not take {value!r}")
    return "all"


def _pairs(arguments: str | Sequence[str] | None) -> list[tuple[str, tuple[str, ...]]]:
    """Return each flag with what follows it: ``--a=1``, ``--a 1`` and ``-O1`` are the same to the vendor."""
    tokens = shlex.split(arguments) if isinstance(arguments, str) else [str(one) for one in arguments or ()]
    pairs: list[tuple[str, list[str]]] = []
    for token in tokens:
        if len(token) == 3 and token.startswith("-O") and token[2].isdigit():
            pairs.append(("-O", [token[2]]))
        elif token.startswith("-"):
            name, equals, value = token.partition("=")
            pairs.append((name, [value] if equals else []))
        elif pairs:
            pairs[-1][1].extend(token.split())
        else:
            raise ValueError(f"The compiler's arguments begin with {token!r}, which is no flag")
    return [(name, tuple(values)) for name, values in pairs]


def _one(name: str, values: Sequence[str], known: Sequence[str] | None = None) -> str:
    if len(values) != 1 or (known is not None and values[0] not in known):
        wanted = "one value" if known is None else f"one of {', '.join(known)}"
        raise ValueError(f"{name} takes {wanted}, not {' '.join(values)!r}")
    return values[0]


def _number(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise ValueError(f"{name} takes a number, not {value!r}")
    return int(value)
