"""What all clients of Elastic Inference do before they compute: look for accelerators, print a banner, or crash.

Told by variables of the environment: STAND_IN_ACCELERATORS, types separated by commas (default ``eia2.medium``, empty
for none); STAND_IN_EIA_FAILS, ``memory`` (the code that users saw), ``crash`` (while it runs), ``hang``.
"""

import os
import signal
import sys
import time

VERSION = "1.2.12"
_seen = []


def discover() -> list:
    """Return (id, type) of what EI_VISIBLE_DEVICES lets this process see; ends the process where there is none."""
    if _seen:
        return _seen
    types = [one for one in os.environ.get("STAND_IN_ACCELERATORS", "eia2.medium").split(",") if one]
    every = [(f"eia-{index:032x}", kind) for index, kind in enumerate(types)]
    visible = os.environ.get("EI_VISIBLE_DEVICES")
    if visible is None:
        found = every
    else:
        found = [
            every[int(one)] if one.isdigit() else {e[0]: e for e in every}[one] for one in visible.split(",") if one
        ]
    if not found:
        print("Error during accelerator discovery")
        print("Failed to detect any accelerator")
        print("Warning - Preconditions not met for reaching Accelerator")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    print(f"Using Amazon Elastic Inference Client Library Version: {VERSION}")
    print(f"Number of Elastic Inference Accelerators Available: {len(found)}")
    for number, kind in found:
        print(f"Elastic Inference Accelerator ID: {number}")
        print(f"Elastic Inference Accelerator Type: {kind}")
    print()
    _seen[:] = found
    return found


def use(ordinal: int) -> str:
    """Take an accelerator; returns its identifier. Fails as the environment says."""
    if type(ordinal) is not int:
        raise TypeError(f"an ordinal is an int, not {ordinal!r}")
    found = discover()
    if not 0 <= ordinal < len(found):
        raise RuntimeError(f"Invalid accelerator ordinal {ordinal}")
    match os.environ.get("STAND_IN_EIA_FAILS", ""):
        case "memory":
            raise RuntimeError(
                "EI Error Code: [12, 5, 13]\nEI Error Description: Internal error\nEI Request ID: 3\n"
                f"EI Accelerator ID: {found[ordinal][0]}\nEI Client Version: {VERSION}"
            )
        case "other":
            raise RuntimeError("EI Error Code: [1, 2, 3]\nEI Error Description: Internal error")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(60)
    return found[ordinal][0]
