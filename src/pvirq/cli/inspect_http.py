"""The small HTTP server of `pvirq export --listen`: GET /metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import click

from pvirq.cli.messages import Messages
from pvirq.inspect.export import CONTENT_TYPE

SLOWEST_S: Final = 10.0  # a client that takes longer to ask is let go


def parse_address(text: str) -> tuple[str, int]:
    """[ADDRESS:]PORT; an IPv6 address stands in brackets. click.UsageError."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise click.UsageError(f"--listen {text}: expected [ADDRESS:]PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], scrape: Callable[[], str]) -> None:
        import socket

        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.scrape = scrape
        self.one_at_a_time = threading.Lock()
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    timeout = SLOWEST_S
    server_version = "pvirq"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(HTTPStatus.OK, "text/plain; charset=utf-8", "pvirq: see /metrics\n")
        elif path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", "no such page\n")
        else:
            self._metrics()

    def _metrics(self) -> None:
        from pvirq.inspect import InspectError

        server: Any = self.server
        try:
            with server.one_at_a_time:
                text = server.scrape()
        except (InspectError, OSError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{error}\n")
            return
        self._answer(HTTPStatus.OK, CONTENT_TYPE, text)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def serve(address: tuple[str, int], scrape: Callable[[], str]) -> None:
    """Serve until interrupted (KeyboardInterrupt). OSError: the address can't be had."""
    with _Server(address, scrape) as server:
        host, port = server.server_address[:2]
        text = host.decode() if isinstance(host, bytes) else str(host)
        shown = f"[{text}]" if ":" in text else text
        Messages().note(f"serving http://{shown}:{port}/metrics")
        server.serve_forever()
