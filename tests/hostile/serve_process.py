"""A whole server in a process of its own, with limits that its command does not offer: ``serve_process.py SETTINGS``.

The settings are JSON: those of `ServerSettings`, ``limits`` those of `Limits`. It prints the ports when it is ready.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelrt.serve.run import serve
from accelrt.serve.settings import Limits, ServerSettings


def main() -> None:
    given = json.loads(sys.argv[1])
    limits = Limits(**given.pop("limits", {}))
    settings = ServerSettings(Path(given.pop("repository")), limits=limits, **given)
    serve(settings, lambda ports: print(json.dumps(dict(ports)), flush=True))


if __name__ == "__main__":
    main()
