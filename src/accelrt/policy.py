"""The fallback policy: what happens when something does not run where it was asked to run."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias, get_args

from accelrt.errors import OptionError

logger = logging.getLogger("accelrt")

Fallback: TypeAlias = Literal["warn", "allow", "error"]
"""``warn``: run it elsewhere, say so once, count it. ``allow``: the same in silence. ``error``: raise."""


def check(fallback: str) -> Fallback:
    """Return the policy.

    Raises:
        OptionError: No policy has this name.
    """
    for known in get_args(Fallback):
        if fallback == known:
            return known  # type: ignore[no-any-return]
    raise OptionError(f"fallback must be one of {', '.join(get_args(Fallback))}, not {fallback!r}.")


def announce(fallback: Fallback, message: str) -> None:
    """Say it at WARNING under ``warn``, at INFO under ``allow``."""
    logger.log(logging.WARNING if fallback == "warn" else logging.INFO, "%s", message)
