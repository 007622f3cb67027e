"""The loopback Hub with its real clients, and what these do when a Hub misbehaves (huggingface_hub 2.4, datasets 5.2).

A client process makes all the calls of a group; the tests look at what came of each. Every faulty call has a repo of
its own, so that its fault can be planned before the process starts.
"""

import http.client
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from hub.loopback_hub import Fault, LoopbackHub
from hub.repositories import HubError

CALLS = """
import json, sys
from collections.abc import Iterator
from huggingface_hub import HfApi
outcomes = {}
for name, method, arguments in json.load(sys.stdin):
    try:
        value = getattr(HfApi(), method)(**arguments)
        outcomes[name] = {"value": list(value) if isinstance(value, Iterator) else value}
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        outcomes[name] = {"error": type(error).__name__, "status": status, "message": str(error)}
json.dump(outcomes, sys.stdout, default=lambda value: getattr(value, "__dict__", str(value)))
"""

LOAD_DATASET = """
import json, sys
from datasets import load_dataset
test = load_dataset("org/data", "de", split="test", revision="v1.0")
streamed = load_dataset("org/data", "en", split="test", streaming=True)
json.dump({"test": test[:], "streamed": list(streamed)}, sys.stdout)
"""

CARD = "---\nlicense: mit\n---\n# A model\n"
DATA_CARD = """---
configs:
- config_name: en
  data_files: [{split: test, path: en/test.parquet}]
- config_name: de
  data_files: [{split: test, path: de/test.parquet}]
---
"""
WEIGHTS = bytes(range(256)) * 16


def run_client(script, environment, calls=None):
    """What a client process prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cached_files(home, repo_id, repo_type="model"):
    """The files of a repo's snapshots in a client's cache, with their content."""
    snapshots = home / "hub" / f"{repo_type}s--{repo_id.replace('/', '--')}" / "snapshots"
    files = [path for path in snapshots.rglob("*") if path.is_file()]
    return {str(path.relative_to(snapshots)).split("/", 1)[1]: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(read_only=["google"]) as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as it is published: a card, a file in a folder, and weights that become an LFS file."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "README.md").write_text(CARD)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "results").mkdir()
    (folder / "results" / "a score.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def published(hub, folder, tmp_path_factory):
    """The outcomes of a client that publishes a model and a data set."""
    data = tmp_path_factory.mktemp("data")
    (data / "README.md").write_text(DATA_CARD)
    for language, rows in {"en": ["one", "two"], "de": ["eins", "zwei", "drei"]}.items():
        (data / language).mkdir()
        Dataset.from_dict({"text": rows}).to_parquet(data / language / "test.parquet")
    model, dataset = {"repo_id": "org/model"}, {"repo_id": "org/data", "repo_type": "dataset"}
    upload = model | {"folder_path": str(folder), "commit_message": "Publish", "commit_description": "All of it"}
    change = model | {"path_or_fileobj": str(folder / "README.md"), "path_in_repo": "MODEL.md"}
    calls = [
        ("whoami", "whoami", {}),
        ("create", "create_repo", model),
        ("create again", "create_repo", model),
        ("create if missing", "create_repo", model | {"exist_ok": True}),
        ("create private", "create_repo", {"repo_id": "private", "private": True}),
        ("upload", "upload_folder", upload),
        ("upload again", "upload_folder", upload),
        ("tag", "create_tag", model | {"tag": "v1.0"}),
        ("tag again", "create_tag", model | {"tag": "v1.0"}),
        ("branch", "create_branch", model | {"branch": "next", "revision": "v1.0"}),
        ("pull request", "upload_file", change | {"create_pr": True}),
        ("change it", "upload_file", change | {"path_in_repo": "CARD.md", "revision": "refs/pr/1"}),
        ("delete a file", "delete_file", model | {"path_in_repo": "README.md", "revision": "next"}),
        ("delete a folder", "delete_folder", model | {"path_in_repo": "results", "revision": "next"}),
        ("delete nothing", "delete_file", model | {"path_in_repo": "none.md", "revision": "next"}),
        ("outdated parent", "upload_file", change | {"parent_commit": "0" * 40}),
        ("another tag", "create_tag", model | {"tag": "wrong"}),
        ("refs", "list_repo_refs", model | {"include_pull_requests": True}),
        ("delete tag", "delete_tag", model | {"tag": "wrong"}),
        ("delete tag again", "delete_tag", model | {"tag": "wrong"}),
        ("delete branch", "delete_branch", model | {"branch": "next"}),
        ("create data", "create_repo", dataset),
        ("upload data", "upload_folder", dataset | {"folder_path": str(data)}),
        ("tag data", "create_tag", dataset | {"tag": "v1.0"}),
    ]
    return run_client(CALLS, hub.client_environment(tmp_path_factory.mktemp("publisher")), calls)


def test_a_repo_is_created_once(hub, published):
    assert published["whoami"]["value"]["name"] == "tester"
    assert published["create"]["value"] == f"{hub.endpoint}/org/model" == published["create if missing"]["value"]
    assert published["create again"]["status"] == 409
    assert published["create private"]["value"] == f"{hub.endpoint}/tester/private"
    assert hub.repo("tester/private").private and not hub.repo("org/model").private


def test_an_unchanged_folder_makes_no_second_commit(hub, published):
    """The client compares the `oid`s that preupload answers and then sends no commit at all."""
    commit, first = hub.commits("org/model")
    assert (commit.title, commit.message, commit.parent) == ("Publish", "All of it", first.oid)
    assert first.title == "initial commit" and list(first.files) == [".gitattributes"]
    assert (
        published["upload"] == published["upload again"] == {"value": f"{hub.endpoint}/org/model/commit/{commit.oid}"}
    )
    assert len(hub.sent("PUT", "/storage/models/org/model/")) == 1


def test_the_commit_carries_small_files_and_pointers_to_large_ones(hub, published):
    request = hub.sent("POST", "/api/models/org/model/commit/main")[0]
    header, *operations = request.lines
    assert header["value"] == {"summary": "Publish", "description": "All of it"}
    assert {operation["value"]["path"]: operation["key"] for operation in operations} == {
        "README.md": "file",
        "model.safetensors": "lfsFile",
        "results/a score.json": "file",
    }
    assert hub.repo("org/model").file("model.safetensors").lfs
    assert hub.read_file("org/model", "README.md", "v1.0") == CARD.encode()


def test_a_tag_is_set_once(hub, published):
    assert hub.tags("org/model") == {"v1.0": hub.commits("org/model")[0].oid}
    assert published["tag"] == {"value": None} and published["tag again"]["status"] == 409
    assert published["delete tag"] == {"value": None}
    assert published["delete tag again"]["error"] == "RevisionNotFoundError"


def test_a_pull_request_leaves_main_alone(hub, published):
    assert published["pull request"]["value"].startswith(f"{hub.endpoint}/org/model/")
    added = set(hub.list_files("org/model", "refs/pr/1")) - set(hub.list_files("org/model"))
    assert added == {"MODEL.md", "CARD.md"}
    assert hub.commits("org/model", "refs/pr/1")[2:] == hub.commits("org/model")


def test_branches_and_refs(hub, published):
    refs = published["refs"]["value"]
    assert [ref["name"] for ref in refs["branches"]] == ["main", "next"]
    assert [ref["ref"] for ref in refs["tags"]] == ["refs/tags/v1.0", "refs/tags/wrong"]
    request = hub.commits("org/model", "refs/pr/1")[0]
    assert refs["pull_requests"] == [{"name": "1", "ref": "refs/pr/1", "target_commit": request.oid}]
    assert published["delete branch"] == {"value": None}
    with pytest.raises(HubError, match="next"):
        hub.list_files("org/model", "next")


def test_files_are_deleted_and_outdated_parents_refused(hub, published):
    branch = next(ref for ref in published["refs"]["value"]["branches"] if ref["name"] == "next")
    assert hub.list_files("org/model", branch["target_commit"]) == [".gitattributes", "model.safetensors"]
    assert published["delete nothing"]["error"] == "RemoteEntryNotFoundError"
    assert published["outdated parent"]["status"] == 412


def test_the_token_goes_to_the_hub_and_not_to_the_storage(hub, published):
    storage = hub.sent(path_contains="/storage/")
    assert storage and all("Authorization" not in request.headers for request in storage)
    api = hub.sent(path_contains="/api/models/org/model/")
    assert all(request.headers["Authorization"] == f"Bearer {hub.token}" for request in api)
    assert not any(hub.token in request.target or hub.token.encode() in request.body for request in hub.requests)


@pytest.fixture(scope="module")
def reader_home(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def read(hub, published, reader_home):
    """The outcomes of a client with a cache of its own, which reads what was published."""
    hub.add_repo("org/secret", {"config.json": "{}"}, private=True)
    hub.add_repo("org/gated", {"config.json": "{}"}, gated=True)
    model, config = {"repo_id": "org/model"}, {"filename": "config.json"}
    tagged = model | {"revision": "v1.0"}
    calls = [
        # The refusals come first: with any token or none, a client returns the file of a repo that is in its cache.
        ("wrong token", "hf_hub_download", model | {"filename": "README.md", "token": "hf_wrong"}),
        ("wrong user", "whoami", {"token": "hf_wrong"}),
        ("no repo", "model_info", {"repo_id": "org/none"}),
        ("no repo, no token", "model_info", {"repo_id": "org/none", "token": False}),
        ("no revision", "model_info", model | {"revision": "v9"}),
        ("no file", "hf_hub_download", model | config),
        ("private, no token", "hf_hub_download", config | {"repo_id": "org/secret", "token": False}),
        ("gated", "hf_hub_download", config | {"repo_id": "org/gated"}),
        ("gated, no token", "hf_hub_download", config | {"repo_id": "org/gated", "token": False}),
        ("private", "hf_hub_download", config | {"repo_id": "org/secret"}),
        ("private, cached", "hf_hub_download", config | {"repo_id": "org/secret", "token": False}),
        ("snapshot", "snapshot_download", tagged),
        ("info", "model_info", tagged | {"files_metadata": True}),
        ("data info", "dataset_info", {"repo_id": "org/data"}),
        ("tree", "list_repo_tree", tagged | {"path_in_repo": "results"}),
        ("paths", "get_paths_info", tagged | {"paths": ["results", "model.safetensors", "none.md"]}),
        ("commits", "list_repo_commits", model),
    ]
    return run_client(CALLS, hub.client_environment(reader_home), calls)


def test_a_tag_is_downloaded_byte_for_byte(hub, folder, read, reader_home):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    snapshot = Path(read["snapshot"]["value"])
    assert snapshot.name == hub.tags("org/model")["v1.0"]
    assert {name: (snapshot / name).read_bytes() for name in files} == files
    assert set(cached_files(reader_home, "org/model")) == {*files, ".gitattributes"}


def test_information_about_repos_and_files(hub, read):
    weights = hub.repo("org/model").file("model.safetensors")
    lfs = {"size": weights.size, "sha256": weights.sha256, "pointer_size": len(weights.pointer)}
    info = read["info"]["value"]
    assert (info["sha"], info["private"], info["gated"]) == (hub.tags("org/model")["v1.0"], False, False)
    sibling = {"rfilename": "model.safetensors", "size": weights.size, "blob_id": weights.blob_id, "lfs": lfs}
    assert sibling in info["siblings"]
    assert read["data info"]["value"]["id"] == "org/data"
    assert [entry["path"] for entry in read["tree"]["value"]] == ["results/a score.json"]
    assert [(entry["path"], entry.get("lfs")) for entry in read["paths"]["value"]] == [
        ("model.safetensors", lfs),
        ("results", None),
    ]
    assert [commit["title"] for commit in read["commits"]["value"]] == ["Publish", "initial commit"]


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        ("no repo", "RepositoryNotFoundError", 404),
        ("no repo, no token", "RepositoryNotFoundError", 401),
        ("no revision", "RevisionNotFoundError", 404),
        ("no file", "RemoteEntryNotFoundError", 404),
        ("private, no token", "RepositoryNotFoundError", 401),
        ("gated", "GatedRepoError", 403),
        ("gated, no token", "GatedRepoError", 401),
        ("wrong token", "HfHubHTTPError", 401),
        ("wrong user", "HfHubHTTPError", 401),
    ],
)
def test_what_cannot_be_read(read, call, error, status):
    assert (read[call].get("error"), read[call].get("status")) == (error, status)


def test_a_private_file_needs_the_token_once(read):
    """What is in the cache is returned without a token: the client takes the refusal for a Hub that is not there."""
    assert read["private"]["value"] == read["private, cached"]["value"]


def test_a_dataset_is_loaded_by_its_id(hub, published, tmp_path):
    """By configuration, split and tag; streaming reads by Range and follows the redirect without the token."""
    loaded = run_client(LOAD_DATASET, hub.client_environment(tmp_path))
    assert loaded["test"] == {"text": ["eins", "zwei", "drei"]}
    assert loaded["streamed"] == [{"text": "one"}, {"text": "two"}]
    assert all("Authorization" not in request.headers for request in hub.sent("GET", "/storage/datasets/"))


def test_writes_need_the_token_and_the_right(hub, folder, tmp_path):
    """Without a token the client reports a missing repo, as it does for the Hub's 401; creating one is a plain 401."""
    hub.add_repo("org/refusing")
    hub.add_repo("google/bert")
    change = {"path_or_fileobj": str(folder / "model.safetensors"), "path_in_repo": "model.safetensors"}
    ours, foreign = change | {"repo_id": "org/refusing"}, change | {"repo_id": "google/bert"}
    calls = [
        ("create, no token", "create_repo", {"repo_id": "org/new", "token": False}),
        ("create, read-only", "create_repo", {"repo_id": "google/new"}),
        ("no token", "upload_file", ours | {"token": False}),
        ("wrong token", "upload_file", ours | {"token": "hf_wrong"}),
        ("read-only", "upload_file", foreign),
        ("pull request", "upload_file", foreign | {"create_pr": True}),
        ("tag, read-only", "create_tag", {"repo_id": "google/bert", "tag": "v1.0"}),
    ]
    outcomes = run_client(CALLS, hub.client_environment(tmp_path), calls)
    assert {name: (outcome.get("error"), outcome.get("status")) for name, outcome in outcomes.items()} == {
        "create, no token": ("HfHubHTTPError", 401),
        "create, read-only": ("HfHubHTTPError", 403),
        "no token": ("RepositoryNotFoundError", 401),
        "wrong token": ("HfHubHTTPError", 401),
        "read-only": ("HfHubHTTPError", 403),
        "pull request": (None, None),
        "tag, read-only": ("HfHubHTTPError", 403),
    }
    assert len(hub.commits("org/refusing")) == len(hub.commits("google/bert")) == 1
    assert len(hub.commits("google/bert", "refs/pr/1")) == 2


@dataclass
class Case:
    """A fault in a download or an upload, and the exception that the client ends with (None: it recovers)."""

    fault: Fault
    method: str
    path: str
    error: str | None = None


# The weights of each repo are named after it: the fault finds them on the Hub and in the storage.
DOWNLOADS = {
    # The first HEAD gives up at once, in case the cache has the file. It has not, and the second one is patient.
    "unavailable-head": Case(Fault.unavailable(), "HEAD", "/unavailable-head.safetensors"),
    # The listing is asked for again after Retry-After and one second.
    "unavailable-tree": Case(Fault.unavailable(), "GET", "/unavailable-tree/tree/"),
    # Two answers of 503 that are final: to the first request of a snapshot, and in place of the content.
    "unavailable-info": Case(Fault.unavailable(), "GET", "/unavailable-info/revision/", "LocalEntryNotFoundError"),
    "unavailable-get": Case(Fault.unavailable(), "GET", "/unavailable-get.safetensors", "HfHubHTTPError"),
    # After a second, the client starts anew; how it goes on with a large file is tested below.
    "cut": Case(Fault.cut(), "GET", "/cut.safetensors"),
    # An answer that takes longer than the client waits counts as none.
    "slow-head": Case(Fault.slow(1.5), "HEAD", "/slow-head.safetensors"),
    "slow-get": Case(Fault.slow(1.5), "GET", "/slow-get.safetensors"),
    "missing-head": Case(Fault.missing(), "HEAD", "/missing-head.safetensors", "RemoteEntryNotFoundError"),
    "missing-get": Case(Fault.missing(), "GET", "/missing-get.safetensors", "RemoteEntryNotFoundError"),
    "unauthorized": Case(Fault.unauthorized(), "HEAD", "/unauthorized.safetensors", "HfHubHTTPError"),
    # Nothing compares the content with the ETag: the client is content, with a file under a false name in its cache.
    "wrong-etag": Case(Fault.wrong_etag(), "HEAD", "/wrong-etag.safetensors"),
}


@pytest.fixture(scope="module")
def faulty_home(tmp_path_factory):
    return tmp_path_factory.mktemp("faulty")


@pytest.fixture(scope="module")
def downloads(hub, faulty_home):
    """The outcomes of a client that downloads a repo for each fault."""
    for name, case in DOWNLOADS.items():
        hub.add_repo(f"org/{name}", {"config.json": "{}", f"{name}.safetensors": WEIGHTS})
        hub.fail(case.fault, method=case.method, path_contains=case.path)
    calls = [(name, "snapshot_download", {"repo_id": f"org/{name}"}) for name in DOWNLOADS]
    patience = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return run_client(CALLS, hub.client_environment(faulty_home) | patience, calls)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_complete_or_fails(hub, downloads, faulty_home, name):
    """Whatever happens, the snapshot holds no file in part: a file is there as a whole or not at all."""
    error = DOWNLOADS[name].error
    assert downloads[name].get("error") == error, downloads[name]
    whole = {path: file.content for path, file in hub.repo(f"org/{name}").resolve("main").files.items()}
    found = cached_files(faulty_home, f"org/{name}")
    assert found == whole if error is None else found.items() < whole.items()
    assert not list(faulty_home.rglob("*.incomplete"))


def test_a_wrong_etag_only_names_the_blob(downloads, faulty_home):
    """A limit of what is read from the Hub, by xlfa too: nothing tells a file from another one of its length."""
    assert (faulty_home / "hub" / "models--org--wrong-etag" / "blobs" / ("0" * 40)).read_bytes() == WEIGHTS


def test_a_large_download_goes_on_where_it_broke_off(hub, tmp_path):
    """The client writes in pieces of 10 MiB: of 24 MiB cut after 12 it keeps the first piece and asks for the rest."""
    weights = WEIGHTS * (24 * 2**20 // len(WEIGHTS))
    hub.add_repo("org/large", {"large.safetensors": weights})
    hub.fail(Fault.cut(), method="GET", path_contains="/large.safetensors")
    calls = [("download", "hf_hub_download", {"repo_id": "org/large", "filename": "large.safetensors"})]
    run_client(CALLS, hub.client_environment(tmp_path), calls)
    assert cached_files(tmp_path, "org/large") == {"large.safetensors": weights}
    requests = hub.sent("GET", "/large.safetensors")
    assert [(request.status, request.headers["Range"]) for request in requests] == [
        (200, None),
        (206, f"bytes={10 * 2**20}-"),
    ]


UPLOADS = {
    # All but the commit itself is tried again, a second later.
    "preupload-unavailable": Case(Fault.unavailable(), "POST", "/preupload-unavailable/preupload/"),
    "lfs-unavailable": Case(Fault.unavailable(), "PUT", "/storage/models/org/lfs-unavailable/"),
    "lfs-cut": Case(Fault.cut(), "PUT", "/storage/models/org/lfs-cut/"),
    "commit-slow": Case(Fault.slow(1.5), "POST", "/commit-slow/commit/"),
    "commit-unavailable": Case(Fault.unavailable(), "POST", "/commit-unavailable/commit/", "HfHubHTTPError"),
    "commit-conflict": Case(Fault.conflict(), "POST", "/commit-conflict/commit/", "HfHubHTTPError"),
    "commit-unauthorized": Case(Fault.unauthorized(), "POST", "/commit-unauthorized/commit/", "HfHubHTTPError"),
    # The commit is made and the client does not know: only a look at the repo can tell.
    "commit-cut": Case(Fault.cut(), "POST", "/commit-cut/commit/", "RemoteProtocolError"),
}


@pytest.fixture(scope="module")
def uploads(hub, folder, tmp_path_factory):
    """The outcomes of a client that publishes to a repo for each fault, and then does it all again."""
    for name, case in UPLOADS.items():
        hub.add_repo(f"org/{name}")
        hub.fail(case.fault, method=case.method, path_contains=case.path)
    calls = [(name, "upload_folder", {"repo_id": f"org/{name}", "folder_path": str(folder)}) for name in UPLOADS]
    again = [(f"{name} again", method, arguments) for name, method, arguments in calls]
    return run_client(CALLS, hub.client_environment(tmp_path_factory.mktemp("uploader")), calls + again)


@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload_makes_one_commit_in_the_end(hub, folder, uploads, name):
    """A folder that is published again after an error is published once: what the first try left is not doubled."""
    assert uploads[name].get("error") == UPLOADS[name].error, uploads[name]
    assert "value" in uploads[f"{name} again"]
    assert len(hub.commits(f"org/{name}")) == 2
    assert hub.read_file(f"org/{name}", "model.safetensors") == (folder / "model.safetensors").read_bytes()


def get(hub, path):
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


def test_faults_are_played_in_order_and_as_often_as_planned():
    with LoopbackHub() as hub:
        hub.add_repo("org/model", {"config.json": "{}"})
        hub.fail(Fault.unavailable(), path_contains="config.json", times=2)
        hub.fail(Fault.cut(), path_contains="config.json", method="GET")
        hub.fail(Fault.missing(), path_contains="README.md")
        address = "/org/model/resolve/main/config.json"
        assert [get(hub, address)[0] for _ in range(2)] == [503, 503]
        with pytest.raises(http.client.IncompleteRead):
            get(hub, address)
        assert get(hub, address) == (200, b"{}")
        assert get(hub, "/somewhere")[0] == 404
        assert [request.status for request in hub.requests] == [503, 503, 200, 200, 404]


def test_a_client_environment_has_nothing_of_the_tests(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_user")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    environment = hub.client_environment(tmp_path, token=False)
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"} & set(environment)
    assert environment["HF_ENDPOINT"] == hub.endpoint and environment["HF_HOME"] == str(tmp_path)
    assert hub.client_environment(tmp_path)["HF_TOKEN"] == hub.token
    assert hub.client_environment(tmp_path, token="hf_other")["HF_TOKEN"] == "hf_other"
