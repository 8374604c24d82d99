"""The part of the Hugging Face Hub's HTTP interface that uploads use, on this machine: repositories are made, files are taken by git-lfs or
in the commit itself, and a token is asked for. What `huggingface_hub` sends is its own."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_aTokenThatMayWrite"
LARGE = (".safetensors", ".mp4", ".png", ".wav", ".pt")


class Hub:
    """What it holds, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[str] = []
        self.failures = 0
        """Commits that will fail with HTTP 500 before the next one that is taken."""
        self.down = False
        """Whether everything fails with HTTP 500."""
        self.commits: list[list[str]] = []
        self.slow = 0.0
        """Seconds that each large file takes."""
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, code: int, body: object = None, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", (headers or {}).get("X-Length", str(len(data))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path))
            if hub.down:
                self.answer(500, {"error": "the stand-in is down"})
                return
            if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid credentials in Authorization header"})
                return
            for method, pattern, respond in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    respond(self, body, *match.groups())
                    return
            hub.unknown.append(f"{self.command} {path}")
            self.answer(404, {"error": "not found"})

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def create(self, body: bytes) -> None:
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            if name in hub.repositories:
                self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                return
            hub.repositories[name], hub.private[name] = {}, asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer(200, {"url": f"{hub.url}/{name}", "name": name})

        def preupload(self, body: bytes, name: str) -> None:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]
            self.answer(200 if name in hub.repositories else 404, {"files": files})

        def batch(self, body: bytes, name: str) -> None:
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/objects/{one['oid']}", "header": {}}}
                there = one["oid"] in hub.objects
                objects.append({"oid": one["oid"], "size": one["size"]} | ({} if there else {"actions": upload}))
            self.answer(200, {"transfer": "basic", "objects": objects})

        def put(self, body: bytes, oid: str) -> None:
            assert hashlib.sha256(body).hexdigest() == oid
            time.sleep(hub.slow)
            hub.objects[oid] = body
            self.answer(200)

        def commit(self, body: bytes, name: str) -> None:
            if hub.failures:
                hub.failures -= 1
                self.answer(500, {"error": f"the stand-in fails; it heard {self.headers.get('Authorization')}"})
                return
            names = []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                names += [value["path"]] if "path" in value else []
            hub.commits.append(names)
            oid = f"{len(hub.commits):040d}"
            self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

        def resolve(self, body: bytes, name: str, path: str) -> None:
            content = hub.repositories.get(name, {}).get(path)
            if content is None:
                self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, "X-Length": str(len(content))})

        def yaml(self, body: bytes) -> None:
            self.answer(200, {"errors": [], "warnings": []})

        def info(self, body: bytes, name: str) -> None:
            found = {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": one} for one in hub.repositories.get(name, {})]}
            self.answer(200 if name in hub.repositories else 404, found)

    Handler_ = Handler
    repository = r"([\w.-]+/[\w.-]+)"
    ROUTES = (
        ("POST", r"/api/repos/create", Handler_.create),
        ("POST", rf"/api/(?:models|datasets)/{repository}/preupload/main", Handler_.preupload),
        ("POST", rf"(?:/datasets)?/{repository}\.git/info/lfs/objects/batch", Handler_.batch),
        ("PUT", r"/objects/(\w+)", Handler_.put),
        ("POST", rf"/api/(?:models|datasets)/{repository}/commit/main", Handler_.commit),
        ("HEAD GET", rf"(?:/datasets)?/{repository}/resolve/\w+/(.+)", Handler_.resolve),
        ("POST", r"/api/validate-yaml", Handler_.yaml),
        ("GET", rf"/api/(?:models|datasets)/{repository}(?:/revision/main)?", Handler_.info),
    )
    return Handler


@contextmanager
def running() -> Iterator[Hub]:
    """A hub at `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
