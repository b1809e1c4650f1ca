"""The status page at ``/ui``: three files as they are, and the state that they show as JSON."""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions made inside a function.

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files

from fastapi import FastAPI, Response

import accelrt
from accelrt.serve.http.replies import json_reply
from accelrt.serve.http.web import response
from accelrt.serve.interface import Service

PAGE = {
    "/ui": ("index.html", "text/html; charset=utf-8"),
    "/ui/page.css": ("page.css", "text/css; charset=utf-8"),
    "/ui/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Open to everybody: they hold nothing of the server. ``/ui/state`` wants the key, which the page asks for."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def status_page(app: FastAPI, service: Service, draining: Callable[[], bool]) -> None:
    """Add the page to an application."""
    started = time.monotonic()
    folder = files("accelrt.serve") / "ui"

    def add(path: str, name: str, kind: str) -> None:
        body = (folder / name).read_bytes()

        async def file() -> Response:
            return Response(body, headers=_HEADERS, media_type=kind)

        app.add_api_route(path, file, include_in_schema=False)

    for path, (name, kind) in PAGE.items():
        add(path, name, kind)

    @app.get("/ui/state", tags=["status"], summary="What the status page shows")
    async def state() -> Response:
        live = service.live()
        server = {
            "version": accelrt.__version__,
            "uptime_s": round(time.monotonic() - started, 1),
            "live": live,
            "ready": live and not draining() and service.ready(),
        }
        models = sorted((asdict(one) for one in service.snapshot()), key=lambda one: (one["name"], one["version"]))
        reply = json_reply({"server": server, "models": models})
        reply.headers = {"cache-control": "no-store"}
        return response(reply)
