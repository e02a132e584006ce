"""A stand-in for the part of the Hugging Face Hub's HTTP API that transfers models.

Repositories are created, files sent in a commit or by git-lfs, in memory. It implements the
documented git-lfs protocol; of xet, which the real Hub prefers, there is only a server that never
answers: other tests set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"
_PRIVATE = (401, {"error": "Invalid username or password."})


def _lfs(path: str, content: bytes) -> dict[str, Any]:
    if not path.endswith(".safetensors"):
        return {}
    return {
        "lfs": {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "pointerSize": 134,
        }
    }


class HubStandIn:
    """The state of the stand-in.

    `repos[REPO]` are its commits, the newest last, each a dict of path -> bytes; `trouble` is its
    answer to everything: None (it works), an HTTP status, or "hang". `cut_after`: it hangs up after
    that many bytes of a file; `stall_after`: it sends nothing more, and keeps the connection; None:
    it sends all. `readers`: tokens that may read; None: everyone may. `is_gated`: everyone may look
    a model up, and only readers get its files. `has_xet`: large files are offered by xet, whose
    server accepts requests (`xet_requests`) and never answers.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.trouble: int | str | None = None
        self.num_requests = 0
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.readers: set[str] | None = None
        self.is_gated = False
        self.has_xet = False
        self.xet_requests: list[str] = []
        self.downloads: list[str] = []
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, method: str, path: str, authorization: str | None, body: bytes
    ) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if isinstance(self.trouble, int):
            return self.trouble, {"error": "the stand-in has trouble"}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "wrong checksum"}
            self.objects[oid] = body
            return 200, {}
        if method == "GET" and path.startswith("/api/models/"):
            return self._look_up(path.removeprefix("/api/models/"), authorization)
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        data = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            return self._create(data)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        for suffix, handle in (
            ("/preupload/main", self._preupload),
            (".git/info/lfs/objects/batch", self._batch),
        ):
            if path.endswith(suffix):
                return 200, handle(data)
        if path.endswith("/commit/main"):
            return self._commit(
                path.removeprefix("/api/models/").removesuffix("/commit/main"), body
            )
        return 404, {"error": f"the stand-in has no {method} {path}"}

    def may_read(self, authorization: str | None) -> bool:
        return self.readers is None or str(authorization).removeprefix("Bearer ") in self.readers

    def _look_up(self, path: str, authorization: str | None) -> tuple[int, Any]:
        """Answer REPO, REPO/revision/REVISION or REPO/tree/REVISION, below /api/models/."""
        repo, _, rest = path.partition("/tree/")
        if repo.partition("/revision/")[0] not in self.repos:
            # The real Hub reveals only to callers with a token that a repository does not exist.
            if authorization or self.readers is None:
                return 404, {"error": "Repository not found"}
            return _PRIVATE
        if not self.is_gated and not self.may_read(authorization):
            if authorization:
                return 401, {"error": "Invalid credentials in Authorization header"}
            return _PRIVATE
        return 200, self._tree(repo) if rest else self._model(repo.partition("/revision/")[0])

    def _create(self, data: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{data['organization']}/{data['name']}"
        answer = {"url": f"{self.endpoint}/{repo}"}
        if repo in self.repos:
            return 409, {**answer, "error": "You already created this model repo"}
        self.repos[repo], self.private[repo] = (
            [],
            data.get("visibility") == "private" or bool(data.get("private")),
        )
        return 200, answer

    def _model(self, repo: str) -> Any:
        siblings = [
            {"rfilename": path, "size": len(content), **_lfs(path, content)}
            for path, content in self.repos[repo][-1].items()
        ]
        return {"id": repo, "sha": f"{len(self.repos[repo]):040d}", "siblings": siblings}

    def _tree(self, repo: str) -> Any:
        files = self.repos[repo][-1].items()
        return [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in files
        ]

    def _preupload(self, data: dict[str, Any]) -> Any:
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in data["files"]
            ]
        }

    def _batch(self, data: dict[str, Any]) -> Any:
        return {
            "transfer": "basic",
            "objects": [
                {**entry, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{entry['oid']}"}}}
                if entry["oid"] not in self.objects
                else entry
                for entry in data["objects"]
            ],
        }

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        files = dict(self.repos[repo][-1]) if self.repos[repo] else {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self.repos[repo].append(files)
        number = len(self.repos[repo])
        return 200, {
            "commitOid": f"{number:040d}",
            "commitUrl": f"{self.endpoint}/{repo}/commit/{number:040d}",
        }


class _Handler(BaseHTTPRequestHandler):
    """HTTP requests to `stand_in`."""

    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self.path.startswith("/xet-token"):
            self._send_xet_token()
        elif self.path.startswith("/xet/"):
            self.stand_in.xet_requests.append(self.path)
            self.stand_in._released.wait(60)
            self.close_connection = True
        elif "/resolve/" in self.path and self.stand_in.trouble is None:
            self._send_file()
        else:
            self._answer()

    def do_HEAD(self) -> None:
        self._send_file()

    def _send_xet_token(self) -> None:
        self.send_response(200)
        self.send_header("X-Xet-Cas-Url", f"{self.stand_in.endpoint}/xet")
        self.send_header("X-Xet-Access-Token", "xet-token")
        self.send_header("X-Xet-Token-Expiration", str(int(time.time()) + 3600))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self) -> None:
        if not self.stand_in.may_read(self.headers.get("Authorization")):
            status = 403 if self.headers.get("Authorization") else 401
            self._refuse(status, "GatedRepo", "Access to this model is restricted")
            return
        repo, _, rest = self.path.partition("?")[0].lstrip("/").partition("/resolve/")
        revision, _, path = rest.partition("/")
        content = self.stand_in.repos[repo][int(revision) - 1][path]
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        if self.stand_in.has_xet and path.endswith(".safetensors"):
            self.send_header("X-Xet-Hash", hashlib.sha256(content).hexdigest())
            self.send_header("X-Xet-Refresh-Route", f"{self.stand_in.endpoint}/xet-token")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "GET":
            self.stand_in.downloads.append(f"{path} from {begin}")
            limits = [
                limit
                for limit in (self.stand_in.cut_after, self.stand_in.stall_after)
                if limit is not None
            ]
            end = min([len(content), *(begin + limit for limit in limits)])
            self.wfile.write(content[begin:end])
            if end < len(content) and self.stand_in.stall_after is not None:
                self.stand_in._released.wait(60)
            self.close_connection = end < len(content)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        self.stand_in.num_requests += 1
        if self.stand_in.trouble == "hang":
            self.stand_in._released.wait(60)
            self.close_connection = True
            return
        status, answer = self.stand_in.answer(
            self.command, self.path, self.headers.get("Authorization"), body
        )
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data
