"""The repos of the loopback Hub, in memory: files, commits, branches, tags and pull requests as in git."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property

# The Hub's own `.gitattributes` is longer; these are the formats that models and data sets here are stored in.
LFS_PATTERNS = (
    *("*.arrow", "*.bin", "*.gz", "*.h5", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.parquet", "*.pkl", "*.pt"),
    *("*.pth", "*.safetensors", "*.tar", "*.zip", "*.zst", "*tfevents*"),
)
LFS_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)

SHORTEST_ABBREVIATION = 7


class HubError(Exception):
    """An error that the Hub answers with: an HTTP status, a message and the `X-Error-Code`, if it has one."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def entry_not_found() -> HubError:
    return HubError(404, "Entry not found", "EntryNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def git_blob_id(content: bytes) -> str:
    """The SHA-1 that git gives to a file of that content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def upload_mode(path: str, size: int) -> str:
    """Whether the Hub wants a file as "lfs" or as "regular" content of a commit: by its name, then by its size."""
    by_name = any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)
    return "lfs" if by_name or size > LFS_SIZE else "regular"


@dataclass(frozen=True)
class File:
    """A file of a commit. Of an LFS file, git holds a pointer; the Hub's answers show both that and the content."""

    content: bytes
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def blob_id(self) -> str:
        return git_blob_id(self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        """What clients name the file by: the SHA-256 of an LFS file, git's SHA-1 of another."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A commit with all files of the repo at that point, by path."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, File]


@dataclass
class Repository:
    """A model or data set repo. It starts as on the Hub: a first commit on `main` that holds `.gitattributes`."""

    id: str
    type: str = "model"
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {".gitattributes": File(GITATTRIBUTES.encode())}
        self.refs["refs/heads/main"] = self._store(first, None, "initial commit", "", "system").oid

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full ref, or a commit id of at least seven characters.

        Raises HubError (RevisionNotFound) when there is none.
        """
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [oid for oid in self.commits if oid.startswith(revision)]
        if len(revision) < SHORTEST_ABBREVIATION or len(found) != 1:
            raise revision_not_found(revision)
        return self.commits[found[0]]

    def file(self, path: str, revision: str = "main") -> File:
        """One file at a revision. Raises HubError (RevisionNotFound, EntryNotFound)."""
        files = self.resolve(revision).files
        if path not in files:
            raise entry_not_found()
        return files[path]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, the last one first. Raises HubError (RevisionNotFound)."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def commit(
        self,
        files: Mapping[str, File],
        title: str,
        *,
        message: str = "",
        author: str = "tester",
        revision: str = "main",
        pull_request: bool = False,
    ) -> Commit:
        """Makes a commit with exactly these files, on a branch or, on top of that branch, as a new pull request.

        Raises HubError (RevisionNotFound) when the revision is no branch and no pull request.
        """
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise revision_not_found(revision)
        commit = self._store(files, self.refs[ref], title, message, author)
        if pull_request:
            ref = f"refs/pr/{len(self.refs_under('refs/pr/')) + 1}"
        self.refs[ref] = commit.oid
        return commit

    def add_files(self, files: Mapping[str, bytes | str], title: str = "Add files") -> Commit:
        """Adds files to `main` in one commit, as an upload would: large files and weights become LFS files."""
        tree = dict(self.resolve("main").files)
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            tree[path] = File(data, lfs=upload_mode(path, len(data)) == "lfs")
        return self.commit(tree, title)

    def create_ref(self, ref: str, revision: str) -> None:
        """Adds a branch or a tag by its full name. Raises HubError: 409 if it exists, RevisionNotFound."""
        if ref in self.refs:
            raise HubError(409, "Reference already exists")
        self.refs[ref] = self.resolve(revision).oid

    def delete_ref(self, ref: str) -> None:
        """Removes a branch or a tag by its full name. Raises HubError: RevisionNotFound, 403 for `main`."""
        if ref == "refs/heads/main":
            raise HubError(403, "Cannot delete the default branch")
        if ref not in self.refs:
            raise revision_not_found(ref)
        del self.refs[ref]

    def refs_under(self, prefix: str) -> dict[str, str]:
        """Commit ids by name of the refs below a prefix such as `refs/tags/`."""
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}

    def _store(self, files: Mapping[str, File], parent: str | None, title: str, message: str, author: str) -> Commit:
        # The number of commits is part of the hash: two equal commits on the same parent must differ.
        identity = [self.type, self.id, len(self.commits), parent, title, {path: files[path].blob_id for path in files}]
        oid = hashlib.sha1(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author, datetime.now(UTC), dict(files))
        self.lfs_objects.update((file.sha256, file.content) for file in files.values() if file.lfs)
        return self.commits[oid]
