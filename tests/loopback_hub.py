"""A hub on this machine that speaks as much HTTP as huggingface_hub needs to create, upload to and read repositories.

with LoopbackHub() as hub:                       # hub.url goes into HF_ENDPOINT
    ...
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_loopback"


class LoopbackHub:
    """Repositories in memory. `files[repo]` are those of its newest commit; `gated` ones are refused to all."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.read(self)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub.write(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """The id of the only commit that a repository has: a hash of its files."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

    def read(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo in self.gated:
            answer(request, 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif repo not in self.files:
            answer(request, 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("api/models/") and "/tree/" in path:
            entries = [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                       for name, content in self.files[repo].items()]  # fmt: skip
            answer(request, 200, entries)
        elif path.startswith("api/models/"):
            siblings = [{"rfilename": name} for name in self.files[repo]]
            answer(request, 200, {"id": repo, "sha": self.commit(repo), "siblings": siblings, "tags": []})
        else:
            name = path.removeprefix(f"{repo}/resolve/").partition("/")[2]
            content = self.files[repo].get(name)
            if content is None:
                answer(request, 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            else:
                head = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit(repo)}
                answer(request, 200, content, head)

    def write(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(request.path).path).strip("/")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            answer(request, 401, {"error": "Invalid username or password."})
        elif path == "api/repos/create":
            wanted = json.loads(body)
            repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.files.setdefault(repo, {})
            answer(request, 200, {"url": f"{self.url}/{repo}", "id": repo})
        elif path == "api/validate-yaml":
            answer(request, 200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            answer(request, 200, {"files": files})
        else:
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = self.commit(repo)
            answer(request, 200, {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})


def answer(
    request: BaseHTTPRequestHandler, status: int, content: object, headers: dict[str, str] | None = None
) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
