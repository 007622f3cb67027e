"""What the loopback Hub answers: the part of the Hub's HTTP API that huggingface_hub 2.4 and datasets 5.2 call.

A request goes in and an answer comes out; sockets and faults are the business of `loopback_hub`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .repositories import Commit, File, HubError, Repository, entry_not_found, upload_mode

USER = "tester"

WRONG_TOKEN = "Invalid credentials in Authorization header"
NO_TOKEN = "Invalid username or password."
DATE = "%Y-%m-%dT%H:%M:%S.000Z"


@dataclass
class Request:
    """A request as it came in: the target with its query still quoted, every header, and the whole body.

    `status` is what it was answered with: 0 as long as there was no answer, and when the connection was dropped.
    """

    method: str
    target: str
    headers: Message
    body: bytes
    status: int = 0

    @property
    def path(self) -> str:
        """The path without query and quoting: what tests compare with."""
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The body as JSON lines: what a commit consists of."""
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass
class Answer:
    """A status, headers and a body. The server adds Content-Length, and leaves the body out for HEAD."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, value: Any, status: int = 200) -> "Answer":
        return cls(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    @classmethod
    def of_error(cls, error: HubError) -> "Answer":
        answer = cls.of({"error": error.message}, error.status)
        answer.headers["X-Error-Message"] = error.message
        if error.code is not None:
            answer.headers["X-Error-Code"] = error.code
        return answer


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []

TYPE_AND_ID = r"(?P<repo_type>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
API_REPO = f"/api/{TYPE_AND_ID}"
WEB_REPO = r"/(?P<prefix>datasets/)?(?P<repo_id>[^/]+/[^/]+)"
STORED = rf"/storage/{TYPE_AND_ID}/(?P<sha256>[0-9a-f]+)"
REVISION = r"/(?P<revision>[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Makes a method of HubApi answer requests whose quoted path matches; the groups become its arguments."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return register


class HubApi:
    """The repos, who may write where, and one method per kind of request."""

    def __init__(self, token: str, read_only: Collection[str]):
        self.token = token
        self.read_only = frozenset(read_only)
        self.repos: dict[tuple[str, str], Repository] = {}
        # Both name this server, once it listens. Clients must take the storage for a foreign host: see `resolve`.
        self.endpoint = self.storage = ""

    def answer(self, request: Request) -> Answer:
        """The answer to a request; an error of the Hub is an answer too."""
        path = urlsplit(request.target).path
        for method, pattern, function in ROUTES:
            if method == request.method and (match := pattern.fullmatch(path)):
                arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
                try:
                    return function(self, request, **arguments)
                except HubError as error:
                    return Answer.of_error(error)
        return Answer.of_error(HubError(404, f"The loopback Hub does not know {request.method} {path}"))

    # Who asks, and for what

    def _authenticated(self, request: Request) -> bool:
        """Whether the request has the token. A wrong one is an error even where none is needed."""
        header = request.headers.get("Authorization")
        if header is not None and header != f"Bearer {self.token}":
            raise HubError(401, WRONG_TOKEN)
        return header is not None

    def _repository(self, request: Request, repo_type: str, repo_id: str) -> Repository:
        """The repo, if this client may know of it.

        Clients take every 401 about a repo for RepoNotFound where the address is https. Here it is http, so the code
        is sent for them to raise the same.
        """
        authenticated = self._authenticated(request)
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and not authenticated):
            missing = HubError(404, "Repository not found", "RepoNotFound")
            raise missing if authenticated else HubError(401, NO_TOKEN, "RepoNotFound")
        return repo

    def _writable(self, request: Request, repo_type: str, repo_id: str, pull_request: bool = False) -> Repository:
        """The repo, if this client may write to it; a pull request may be opened on every repo."""
        repo = self._repository(request, repo_type, repo_id)
        if not self._authenticated(request):
            raise HubError(401, NO_TOKEN, "RepoNotFound")
        if repo.namespace in self.read_only and not pull_request:
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _web_address(self, repo: Repository) -> str:
        return f"{self.endpoint}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"

    # The user and the making of repos

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        if not self._authenticated(request):
            raise HubError(401, NO_TOKEN)
        access = {"accessToken": {"displayName": "loopback", "role": "write"}}
        orgs = [{"type": "org", "name": name, "roleInOrg": "read"} for name in sorted(self.read_only)]
        return Answer.of({"type": "user", "name": USER, "fullname": "Tester", "orgs": orgs, "auth": access})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        """Warns of a card without metadata. The metadata themselves are not looked at."""
        warning = {"message": "empty or missing yaml metadata in repo card"}
        has_metadata = json.loads(request.body)["content"].startswith("---\n")
        return Answer.of({"errors": [], "warnings": [] if has_metadata else [warning]})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        if not self._authenticated(request):
            raise HubError(401, NO_TOKEN)
        asked = json.loads(request.body)
        namespace, repo_type = asked.get("organization") or USER, asked.get("type", "model")
        if namespace in self.read_only:
            raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
        repo = Repository(f"{namespace}/{asked['name']}", repo_type, private=asked.get("visibility") == "private")
        if (repo.type, repo.id) in self.repos:
            # The address is part of the error: clients that do not mind the repo take it from there.
            error = f"You already created this {repo_type} repo"
            return Answer.of({"error": error, "url": self._web_address(repo)}, 409)
        self.repos[repo.type, repo.id] = repo
        return Answer.of({"url": self._web_address(repo), "name": repo.id})

    # Reading

    @route("GET", f"{API_REPO}(?:/revision{REVISION})?")
    def repo_info(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._repository(request, repo_type, repo_id)
        commit = repo.resolve(revision or "main")
        with_blobs = "blobs" in request.query
        info = {
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.oid,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "createdAt": repo.history()[-1].date.strftime(DATE),
            "lastModified": commit.date.strftime(DATE),
            "tags": [],
            "siblings": [_sibling(path, file, with_blobs) for path, file in sorted(commit.files.items())],
        }
        return Answer.of(info)

    @route("GET", f"{API_REPO}/tree{REVISION}(?:/(?P<path>.+))?")
    def tree(self, request: Request, repo_type: str, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._repository(request, repo_type, repo_id).resolve(revision)
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = list(_entries_below(commit, path, recursive))
        if path and not entries:
            raise entry_not_found()
        return Answer.of(entries)

    @route("POST", f"{API_REPO}/paths-info{REVISION}")
    def paths_info(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        commit = self._repository(request, repo_type, repo_id).resolve(revision)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return Answer.of([entry for entry in _entries_below(commit, "", recursive=True) if entry["path"] in wanted])

    @route("GET", f"{API_REPO}/commits{REVISION}")
    def list_commits(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        history = self._repository(request, repo_type, repo_id).history(revision)
        commits = [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date.strftime(DATE),
            }
            for commit in history
        ]
        return Answer.of(commits)

    @route("GET", f"{API_REPO}/refs")
    def list_refs(self, request: Request, repo_type: str, repo_id: str) -> Answer:
        repo = self._repository(request, repo_type, repo_id)

        def listed(prefix: str) -> list[dict[str, str]]:
            found = repo.refs_under(prefix)
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in found.items()]

        refs = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        if "include_prs" in request.query:
            refs["pullRequests"] = listed("refs/pr/")
        return Answer.of(refs)

    @route("GET HEAD", f"{WEB_REPO}/resolve{REVISION}/(?P<path>.+)")
    def resolve(self, request: Request, prefix: str, repo_id: str, revision: str, path: str) -> Answer:
        """A file, or for an LFS file the way to it.

        As on the Hub, LFS content comes from another host, by a redirect that itself tells its hash and size. The
        storage is this server under its other name, `localhost`, so clients must keep their token from it.
        """
        repo = self._repository(request, "dataset" if prefix else "model", repo_id)
        if repo.gated:
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if self._authenticated(request) else 401, message, "GatedRepo")
        commit = repo.resolve(revision)
        if path not in commit.files:
            answer = Answer.of_error(entry_not_found())
        elif commit.files[path].lfs:
            file = commit.files[path]
            answer = Answer(302, {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)})
            answer.headers["Location"] = f"{self._object_address(repo, file.sha256)}/{quote(path)}"
        else:
            answer = _content(request, commit.files[path].content, commit.files[path].etag)
        # A missing file's answer has the commit too: clients keep in their cache that this commit lacks the file.
        answer.headers["X-Repo-Commit"] = commit.oid
        return answer

    # Writing

    @route("POST", f"{API_REPO}/preupload{REVISION}")
    def preupload(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        """How to upload each file, and the hash of the file that is there, by which clients skip what is unchanged."""
        repo = self._writable(request, repo_type, repo_id, pull_request="create_pr" in request.query)
        present = repo.resolve(revision).files
        files = []
        for asked in json.loads(request.body)["files"]:
            path = asked["path"]
            oid = present[path].etag if path in present else None
            mode = upload_mode(path, asked["size"])
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.of({"files": files})

    @route("POST", rf"{WEB_REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, prefix: str, repo_id: str) -> Answer:
        """Where to put each LFS object that is not there yet. For a pull request, clients name no ref."""
        asked = json.loads(request.body)
        repo = self._writable(request, "dataset" if prefix else "model", repo_id, pull_request="ref" not in asked)
        objects = []
        for wanted in asked["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.lfs_objects:
                found["actions"] = {"upload": {"href": self._object_address(repo, wanted["oid"])}}
            objects.append(found)
        return Answer.of({"transfer": "basic", "objects": objects})

    @route("POST", f"{API_REPO}/commit{REVISION}")
    def commit(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        pull_request = "create_pr" in request.query
        repo = self._writable(request, repo_type, repo_id, pull_request)
        head = repo.resolve(revision)
        header, *operations = request.lines
        title, message = header["value"]["summary"], header["value"]["description"]
        if not head.oid.startswith(header["value"].get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            _apply(repo, files, operation["key"], operation["value"])
        made = repo.commit(files, title, message=message, revision=revision, pull_request=pull_request)
        address = self._web_address(repo)
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{address}/commit/{made.oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{address}/discussions/{len(repo.refs_under('refs/pr/'))}"
        return Answer.of(answer)

    @route("POST", f"{API_REPO}/tag{REVISION}")
    def create_tag(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._writable(request, repo_type, repo_id)
        repo.create_ref(f"refs/tags/{json.loads(request.body)['tag']}", revision)
        return Answer()

    @route("POST", f"{API_REPO}/branch{REVISION}")
    def create_branch(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._writable(request, repo_type, repo_id)
        repo.create_ref(f"refs/heads/{revision}", json.loads(request.body).get("startingPoint", "main"))
        return Answer()

    @route("DELETE", f"{API_REPO}/(?P<kind>tag|branch){REVISION}")
    def delete_ref(self, request: Request, repo_type: str, repo_id: str, kind: str, revision: str) -> Answer:
        repo = self._writable(request, repo_type, repo_id)
        repo.delete_ref(f"refs/{'tags' if kind == 'tag' else 'heads'}/{revision}")
        return Answer()

    # The storage of LFS objects: its addresses are permission enough, as signed ones are

    def _object_address(self, repo: Repository, sha256: str) -> str:
        return f"{self.storage}/storage/{repo.type}s/{repo.id}/{sha256}"

    @route("PUT", STORED)
    def put_object(self, request: Request, repo_type: str, repo_id: str, sha256: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "The content does not have the hash that was announced")
        self.repos[repo_type, repo_id].lfs_objects[sha256] = request.body
        return Answer()

    @route("GET HEAD", f"{STORED}/.+")
    def get_object(self, request: Request, repo_type: str, repo_id: str, sha256: str) -> Answer:
        return _content(request, self.repos[repo_type, repo_id].lfs_objects[sha256], sha256)


def _content(request: Request, content: bytes, etag: str) -> Answer:
    """Content as a whole, or the range that the request asks for. Raises HubError: 416 for a range outside."""
    headers = {"Content-Type": "application/octet-stream", "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if span is None:
        return Answer(200, headers, content)
    start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
    if start > end:
        raise HubError(416, f"No bytes {start}-{end} in {len(content)}")
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, headers, content[start : end + 1])


def _sibling(path: str, file: File, with_blobs: bool) -> dict[str, Any]:
    """A file as the information about a repo lists it, with hashes and sizes if they were asked for."""
    sibling: dict[str, Any] = {"rfilename": path}
    if with_blobs:
        sibling |= {"size": file.size, "blobId": file.blob_id}
        if file.lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return sibling


def _entries_below(commit: Commit, folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """The folders and files below a folder as the tree lists them, a folder before what is in it."""
    prefix = f"{folder}/" if folder else ""
    seen = set()
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        *folders, _ = path.removeprefix(prefix).split("/")
        for depth in range(1, len(folders if recursive else folders[:1]) + 1):
            parent = prefix + "/".join(folders[:depth])
            if parent not in seen:
                seen.add(parent)
                # No client compares folder hashes; this one differs by commit and by folder.
                oid = hashlib.sha1(f"{commit.oid} {parent}".encode()).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": parent}
        if recursive or not folders:
            entry = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            yield entry


def _apply(repo: Repository, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
    """Applies one line of a commit to the files. Raises HubError: EntryNotFound, or 400 for an object not uploaded."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in repo.lfs_objects:
            raise HubError(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
        files[path] = File(repo.lfs_objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = f"{path.rstrip('/')}/"
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"The loopback Hub does not know the commit operation {key}")
