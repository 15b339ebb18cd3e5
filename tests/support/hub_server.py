"""A stand-in for the hub on this machine: folders of checkpoints, and what was asked for of them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Hub:
    """A running stand-in.

    Attributes:
        url: for `HF_ENDPOINT`.
        sent: bytes of content by path, `someone/model/file`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.sent: dict[str, int] = {}


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve the folders two levels below `root` as models, on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(content=False)

        def do_GET(self) -> None:
            self._answer(content=True)

        def _answer(self, *, content: bool) -> None:
            found = _FILE.fullmatch(self.path)
            file = root / found["repository"] / found["file"] if found else None
            if file is None or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if file is not None else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = file.read_bytes()
            part = _RANGE.fullmatch(self.headers.get("Range", "") if content else "")
            body = data[int(part[1]) : int(part[2]) + 1] if part else data
            self.send_response(206 if part else 200)
            self.send_header("ETag", f'"{len(data):040x}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if content:
                self.wfile.write(body)
                name = str(file.relative_to(root))
                hub.sent[name] = hub.sent.get(name, 0) + len(body)

        def log_message(self, *_args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
