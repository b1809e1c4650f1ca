"""Whether an engine is what its name says: reports never leave that open."""

from __future__ import annotations

from typing import Literal, TypeAlias

Nature: TypeAlias = Literal["real", "emulated", "stand-in"]
"""``emulated`` computes on the CPU in the name of other hardware; a ``stand-in`` takes a runtime's place in tests."""


def mark_of(nature: str) -> str:
    """Return what follows an engine's name: nothing for a real one, else its nature in brackets."""
    return "" if nature == "real" else f" ({nature})"
