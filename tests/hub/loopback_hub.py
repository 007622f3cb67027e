"""A Hugging Face Hub on this machine, for tests of what is published and downloaded.

    with LoopbackHub() as hub:
        hub.add_repo("org/name", {"config.json": "{}"}, tags=["v1.0"])
        hub.fail(Fault.cut(), path_contains="model.safetensors", method="GET")
        subprocess.run([...], env=hub.client_environment(tmp_path), check=True)
        assert len(hub.sent("POST", "/commit/")) == 1

The clients are subprocesses: huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import os
import socket
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .endpoints import Answer, HubApi, Request
from .repositories import Commit, HubError, Repository, entry_not_found

TOKEN = "hf_loopback_test_token"

# A response's headers that name the content, of regular and of LFS files.
ETAG_HEADERS = ("ETag", "X-Linked-Etag")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with an answer. The class methods name the kinds.

    An `error` is answered in place of what the request asked for, with `headers` added. A `cut` answer was carried
    out on the server, but only half of its body arrives, or nothing if it has none, and the connection is closed.
    """

    error: HubError | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_off: bool = False
    etag: str | None = None
    seconds: float = 0.0

    @classmethod
    def unavailable(cls, retry_after: int = 0) -> "Fault":
        """503 with Retry-After; huggingface_hub 2.4 waits a second longer than that."""
        return cls(HubError(503, "Service Unavailable"), {"Retry-After": str(retry_after)})

    @classmethod
    def cut(cls) -> "Fault":
        """The connection breaks in the middle of the body. The server did what it was asked for."""
        return cls(cut_off=True)

    @classmethod
    def wrong_etag(cls, etag: str = "0" * 40) -> "Fault":
        """The right content under the name of another."""
        return cls(etag=etag)

    @classmethod
    def missing(cls) -> "Fault":
        """404 EntryNotFound for a file that is there; without the commit, so no client remembers it."""
        return cls(entry_not_found())

    @classmethod
    def unauthorized(cls) -> "Fault":
        """401 as for a token that is no longer valid."""
        return cls(HubError(401, "Invalid credentials in Authorization header"))

    @classmethod
    def conflict(cls) -> "Fault":
        """409 as for a commit while another one is being made."""
        return cls(HubError(409, "Another commit is in progress on this repo"))

    @classmethod
    def slow(cls, seconds: float) -> "Fault":
        """The right answer, late."""
        return cls(seconds=seconds)


@dataclass
class _PlannedFault:
    fault: Fault
    path_contains: str
    method: str | None
    left: int

    def meets(self, request: Request) -> bool:
        return self.left > 0 and self.path_contains in request.path and self.method in (None, request.method)


class LoopbackHub:
    """A Hub that listens on 127.0.0.1 while it is open, as a context manager. All of it is in memory.

    Everyone with the token may write everywhere but in the `read_only` namespaces.
    """

    def __init__(self, token: str = TOKEN, read_only: Collection[str] = ()):
        self.token = token
        self.requests: list[Request] = []
        self._api = HubApi(token, read_only)
        self._planned: list[_PlannedFault] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "LoopbackHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self._api.endpoint = f"http://127.0.0.1:{port}"
        self._api.storage = f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return self._api.endpoint

    def client_environment(self, home: Path, token: bool | str = True) -> dict[str, str]:
        """The environment of a client process: this Hub, a cache of its own below `home`, and nothing of ours.

        The token is the valid one, none (False) or the one given.
        """
        ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        # Xet would upload and download past this server; a proxy would not find it.
        direct = "127.0.0.1,localhost"
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": direct, "no_proxy": direct}
        if token:
            environment["HF_TOKEN"] = self.token if token is True else token
        return environment

    # What is on the Hub

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        tags: Collection[str] = (),
    ) -> Repository:
        """Puts a repo on the Hub, its files in one commit and the tags on it. No client can read a gated one's files.

        Further commits are made with the `add_files` of what is returned.
        """
        repo = Repository(repo_id, repo_type, private, gated)
        if files:
            repo.add_files(files)
        for tag in tags:
            repo.create_ref(f"refs/tags/{tag}", "main")
        with self._lock:
            self._api.repos[repo_type, repo_id] = repo
        return repo

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        """Raises KeyError when there is none."""
        return self._api.repos[repo_type, repo_id]

    def read_file(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        """Raises KeyError without the repo, HubError without the revision or the file."""
        return self.repo(repo_id, repo_type).file(path, revision).content

    def list_files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        """The paths at a revision in order. Raises KeyError without the repo, HubError without the revision."""
        return sorted(self.repo(repo_id, repo_type).resolve(revision).files)

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """The commits up to a revision, the last one first and the "initial commit" of the Hub at the end."""
        return self.repo(repo_id, repo_type).history(revision)

    def tags(self, repo_id: str, repo_type: str = "model") -> dict[str, str]:
        """Commit ids by tag."""
        return self.repo(repo_id, repo_type).refs_under("refs/tags/")

    # What clients send, and what they get

    def sent(self, method: str | None = None, path_contains: str = "") -> list[Request]:
        """The requests so far, in the order they came in, by method and part of the path."""
        return [
            request for request in self.requests if method in (None, request.method) and path_contains in request.path
        ]

    def fail(self, fault: Fault, *, path_contains: str = "", method: str | None = None, times: int = 1) -> None:
        """Plans a fault for the next requests that match; of several that match, the first one planned is played.

        The content of an LFS file comes from `/storage/models/{id}/{sha256}/{path}` and goes to the same address
        without the path: the name of the repo and, for downloads, of the file match there too.
        """
        with self._lock:
            self._planned.append(_PlannedFault(fault, path_contains, method, times))

    def answer(self, request: Request) -> tuple[Answer, Fault]:
        """What the server sends, and what is wrong with it; the request is on record from here on."""
        with self._lock:
            self.requests.append(request)
            planned = next((planned for planned in self._planned if planned.meets(request)), None)
            if planned is None:
                return self._api.answer(request), Fault()
            planned.left -= 1
            fault = planned.fault
            answer = self._api.answer(request) if fault.error is None else Answer.of_error(fault.error)
            answer.headers.update(fault.headers)
            if fault.etag is not None:
                answer.headers.update((name, f'"{fault.etag}"') for name in ETAG_HEADERS if name in answer.headers)
            return answer, fault


class _Handler(BaseHTTPRequestHandler):
    """Reads a request from the connection and sends what the Hub answers."""

    protocol_version = "HTTP/1.1"
    # Headers and body are written one after the other: with Nagle's algorithm each answer would take 40 ms.
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        try:
            self._handle()
        except ConnectionError:
            # The client hung up, as one does that has waited for too long.
            self.close_connection = True

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, self.headers, body)
        answer, fault = self.server.hub.answer(request)
        time.sleep(fault.seconds)
        sent = b"" if self.command == "HEAD" else answer.body
        if fault.cut_off:
            sent = sent[: len(sent) // 2]
            self.close_connection = True
            if not sent:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the terminal: `LoopbackHub.requests` is the log."""
