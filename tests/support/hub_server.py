"""A server that answers as the hub of Hugging Face does, for models in folders of this machine."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c" * 40
INFO = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>.+)")
TREE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/?]+)(\?.*)?")
FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """A running server: its address, and the files that clients have fetched from it, in order."""

    address: str
    fetched: list[str] = field(default_factory=list)

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the environment in which Hugging Face's tools use this hub and ``cache`` alone."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def serve_models(models: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve the files of the folders ``models``, each under its name, until the context ends."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None: ...

        def _answer(self, with_body: bool) -> None:
            info, tree, file = (form.fullmatch(self.path) for form in (INFO, TREE, FILE))
            known = next((match for match in (info, tree, file) if match and match["name"] in models), None)
            if known is None or known["revision"] not in ("main", COMMIT):
                self._send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})
                return
            folder = models[known["name"]]
            paths = sorted(folder.iterdir())
            if info:
                siblings = [{"rfilename": path.name} for path in paths]
                found: object = {"id": info["name"], "sha": COMMIT, "siblings": siblings}
                self._send(200, json.dumps(found).encode(), with_body)
            elif tree:
                sizes = [(path.name, path.stat().st_size) for path in paths]
                found = [{"type": "file", "path": p, "size": size, "oid": "0" * 40} for p, size in sizes]
                self._send(200, json.dumps(found).encode(), with_body)
            elif file and folder / file["file"] in paths:
                if with_body:
                    hub.fetched.append(file["file"])
                self._send(200, (folder / file["file"]).read_bytes(), with_body)
            else:
                self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})

        def _send(
            self, status: int, body: bytes, with_body: bool, more: Mapping[str, str] | None = None
        ) -> None:
            self.send_response(status)
            etag = hashlib.sha256(body).hexdigest()
            headers = {"Content-Length": str(len(body)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            for name, value in (headers | dict(more or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
