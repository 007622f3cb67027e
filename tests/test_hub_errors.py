"""What users read when the Hub fails while a command reads a model or a data set: one line with cause and remedy.

One client process makes all calls: huggingface_hub reads HF_ENDPOINT when it is imported. Each call has a repo of its
own, whose fault lasts.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from hub.loopback_hub import Fault, LoopbackHub
from huggingface_hub.utils import hf_raise_for_status, httpx
from transformers import AutoConfig

from modeling_xlfa import XLFAForSequenceClassification
from xlfa.backbones import naming_model
from xlfa.data import load_rows
from xlfa.errors import XLFAError
from xlfa.evaluation import load_model
from xlfa.hub_errors import naming_push_errors, naming_read_errors
from xlfa.retrieval import load_states_model
from xlfa.tasks import get_task

CLIENT = """
import contextlib, io, json, os, sys, time, traceback
from xlfa.cli import main
from xlfa.data import load_rows
from xlfa.errors import exit_with_message
sleep = time.sleep
# Clients wait for seconds before they try again.
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
outcomes = {}
for name, arguments, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            if arguments[0] == "rows":
                exit_with_message(lambda dataset: load_rows(*dataset), arguments[1:])
            else:
                main(arguments)
        except SystemExit as done:
            status = done.code
        except Exception:
            status = 1
            traceback.print_exc()
    outcomes[name] = {"status": status, "errors": errors.getvalue()}
json.dump(outcomes, sys.stdout)
"""
CARD = """---
configs:
- config_name: de
  data_files: [{split: test, path: de/test.parquet}]
---
"""
RUN_AGAIN = "run it again: files that have arrived whole are not fetched twice"
LOG_IN = "log in with `hf auth login`, or check HF_TOKEN"
UNAVAILABLE = f"the Hub is not available (503): wait a while, then {RUN_AGAIN}"
UNAUTHORIZED = f"the Hub does not accept the token for org/{{name}} (401): {LOG_IN}"
BROKEN = f"the connection to the Hub broke (RemoteProtocolError): {RUN_AGAIN}"
GATED = f"org/{{name}} is gated (403): ask for access on its page on the Hub, and {LOG_IN}"
PRIVATE = f" (404): check the name; if it is private, {LOG_IN}"
OFFLINE = "HF_HUB_OFFLINE is set, and this is neither a folder nor whole in the cache: check the name, or unset it"
CUT_FILE = "/storage/{kind}s/org/{name}/"


@dataclass
class Case:
    """What is read, the fault in the answers about a file (or at an address), and what the message says.

    None: all is well.
    """

    command: str
    says: str | None
    fault: Fault | None = None
    file: str = ""
    # Of the repo, which otherwise has all files of an encoder, a trained model or a data set.
    without: str = " "
    gated: bool = False
    token: str | None = None


CASES = {
    "eval-well": Case("eval", None),
    "eval-unavailable": Case("eval", UNAVAILABLE, Fault.unavailable(), "config.json"),
    # transformers takes these two for files that the repo does not have.
    "eval-no-weights-now": Case("eval", UNAVAILABLE, Fault.unavailable(), "model.safetensors"),
    "eval-no-tokenizer-now": Case("eval", UNAVAILABLE, Fault.unavailable(), "tokenizer.json"),
    "eval-unauthorized": Case("eval", UNAUTHORIZED, Fault.unauthorized(), "config.json"),
    "eval-wrong-token": Case("eval", UNAUTHORIZED, token="hf_wrong"),
    "eval-cut-config": Case("eval", BROKEN, Fault.cut(), "config.json"),
    "eval-cut-weights": Case("eval", BROKEN, Fault.cut(), CUT_FILE),
    "eval-gated": Case("eval", GATED, gated=True),
    "eval-weightless": Case(
        "eval", "the repo org/{name} on the Hub has no weights such as model.safetensors", without="model.safetensors"
    ),
    "eval-unlisted": Case(
        "eval", "org/{name} on the Hub lacks the file model.safetensors (404)", Fault.missing(), "model.safetensors"
    ),
    "train-unavailable": Case("train", UNAVAILABLE, Fault.unavailable(), "config.json"),
    "train-unauthorized": Case("train", UNAUTHORIZED, Fault.unauthorized(), "model.safetensors"),
    "train-cut-weights": Case("train", BROKEN, Fault.cut(), CUT_FILE),
    "train-configless": Case(
        "train", "the repo org/{name} on the Hub has no config.json: name one that has", without="config.json"
    ),
    "rows-well": Case("rows", None),
    "rows-unavailable": Case("rows", UNAVAILABLE, Fault.unavailable(), "README.md"),
    "rows-unavailable-info": Case("rows", UNAVAILABLE, Fault.unavailable(), "/api/datasets/org/{name}/"),
    "rows-unavailable-file": Case("rows", UNAVAILABLE, Fault.unavailable(), "de/test.parquet"),
    # datasets takes this for a repo without data files.
    "rows-unauthorized-tree": Case("rows", UNAUTHORIZED, Fault.unauthorized(), "/api/datasets/org/{name}/tree"),
    "rows-unauthorized": Case("rows", UNAUTHORIZED, Fault.unauthorized(), "README.md"),
    "rows-cut": Case("rows", BROKEN, Fault.cut(), CUT_FILE),
    "rows-missing": Case(
        "rows", "org/{name} on the Hub lacks the file de/test.parquet (404)", Fault.missing(), "de/test.parquet"
    ),
    "rows-gated": Case("rows", GATED, gated=True),
    # Not on the Hub at all.
    "eval-none": Case("eval", "no model there" + PRIVATE),
    "train-none": Case("train", "no such encoder on the Hub or as a folder" + PRIVATE),
    "rows-none": Case("rows", "there is none on the Hub" + PRIVATE),
}


@pytest.fixture(scope="module")
def outcomes(tiny_encoder, tmp_path_factory):
    """What came of each case."""
    trained, data = (tmp_path_factory.mktemp(name) for name in ("trained", "data"))
    labels = get_task("xnli").label_names
    fields = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    XLFAForSequenceClassification.from_encoder(tiny_encoder, fusion="none", **fields).save_pretrained(trained)
    Dataset.from_dict({"text": ["eins", "zwei"]}).to_parquet(data / "test.parquet")
    encoder = {path.name: path.read_bytes() for path in Path(tiny_encoder).iterdir()}
    weights = {name: (trained / name).read_bytes() for name in ("config.json", "model.safetensors")}
    rows = {"README.md": CARD, "de/test.parquet": (data / "test.parquet").read_bytes()}
    files = {"eval": encoder | weights, "train": encoder, "rows": rows}
    small = f"--task xnli --data_root sample --output_dir {tmp_path_factory.mktemp('out')}"
    options = {
        "eval": [*small.split(), "--languages", "de", "--max_examples", "9"],
        "train": [*small.split(), "--max_train_examples", "16", "--max_eval_examples", "9"],
    }
    calls = []
    with LoopbackHub() as hub:
        for name, case in CASES.items():
            add(hub, name, case, files[case.command])
            place = [f"org/{name}", "de", "test"] if case.command == "rows" else ["--model", f"org/{name}"]
            calls.append((name, [case.command, *place, *options.get(case.command, [])], case.token or hub.token))
        home = tmp_path_factory.mktemp("home")
        # Else a thread of transformers asks for the conversion of weights.
        environment = hub.client_environment(home) | {"DISABLE_SAFETENSORS_CONVERSION": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps(calls),
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return json.loads(done.stdout)


def add(hub, name, case, files):
    """The case's repo and its fault."""
    if name.endswith("-none"):
        return
    kind = "dataset" if case.command == "rows" else "model"
    kept = {path: content for path, content in files.items() if path != case.without}
    repo = hub.add_repo(f"org/{name}", kept, repo_type=kind, gated=case.gated)
    if case.fault is None:
        return
    if case.file.startswith("/"):
        paths = [case.file.format(kind=kind, name=name)]
    else:
        paths = [f"/org/{name}/resolve/{revision}/{case.file}" for revision in ("main", repo.resolve("main").oid)]
    # What is cut is a body.
    method = "GET" if case.fault.cut_off else None
    for path in paths:
        hub.fail(case.fault, method=method, path_contains=path, times=99)


@pytest.mark.parametrize("name", CASES)
def test_a_failure_of_the_hub_is_one_line_that_names_cause_and_remedy(outcomes, name):
    case, outcome = CASES[name], outcomes[name]
    lines = [line for line in outcome["errors"].splitlines() if line.startswith("error: ")]
    assert "Traceback" not in outcome["errors"]
    if case.says is None:
        assert outcome["status"] == 0 and not lines, outcome["errors"]
        return
    (line,) = lines
    assert outcome["status"] == 2 and outcome["errors"].endswith(f"{line}\n")
    place = f"the data set 'org/{name}'" if case.command == "rows" else f"--model org/{name}"
    assert line.startswith(f"error: {place}: {case.says.format(name=name)}")
    assert line.endswith("; or name a local mirror of it with --data_root") == (case.command == "rows")
    assert "://" not in line and "hf_" not in line


# The tests are offline.
def test_offline_the_name_and_the_variable_are_named():
    for load, place in (
        (lambda: load_model(get_task("xnli"), "org/none", "question_model"), "--question_model org/none"),
        (lambda: load_states_model("org/none"), "--model org/none"),
        (lambda: load_rows("org/none", None, "test"), "the data set 'org/none'"),
    ):
        with pytest.raises(XLFAError, match=f"^{place}: {OFFLINE}"):
            load()


def test_offline_a_part_of_a_model_in_the_cache_is_not_the_whole(tiny_encoder, tmp_path, monkeypatch):
    """As a download that was interrupted leaves it: transformers says that the model has no such file."""
    repo = tmp_path / "models--org--part"
    shutil.copytree(tiny_encoder, repo / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("model.safetensors"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert AutoConfig.from_pretrained("org/part").model_type == "bert"
    with pytest.raises(XLFAError, match=f"^--model org/part: {OFFLINE}"):
        load_states_model("org/part")


def refused(status, repo="org/name", code="", reason=""):
    """Raise what huggingface_hub does for an answer; the address is signed."""
    address = f"https://huggingface.co/{repo}/resolve/main/config.json?X-Amz-Signature=secret"
    headers = {"X-Error-Code": code, "X-Error-Message": reason}
    hf_raise_for_status(httpx.Response(status, headers=headers, request=httpx.Request("GET", address)))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status": 429}, f"the Hub is not available (429): wait a while, then {RUN_AGAIN}"),
        ({"status": 403}, f"this token may not read org/name (403): {LOG_IN}"),
        ({"status": 418, "reason": "a\nteapot"}, "the Hub refused the request for org/name (418): a teapot"),
        ({"status": 404, "code": "EntryNotFound"}, "org/name on the Hub lacks the file config.json (404)"),
        # Of an adapter, the encoder.
        ({"status": 403, "code": "GatedRepo", "repo": "lab/encoder"}, "lab/encoder is gated (403): ask for access"),
        ({"status": 404, "code": "RepoNotFound", "repo": "lab/encoder"}, "no repo lab/encoder on the Hub (404)"),
    ],
)
def test_other_refusals(answer, says):
    with pytest.raises(XLFAError) as caught, naming_read_errors("--model org/name", "org/name", "no model there"):
        try:
            refused(**answer)
        except OSError as error:
            raise OSError("cannot load it") from error
    assert str(caught.value).startswith(f"--model org/name: {says}")
    assert "secret" not in str(caught.value)


def test_a_broken_transfer_of_weights_is_named_without_its_signed_address():
    """As hf_xet breaks off: a built-in class, raised by an extension that huggingface_hub calls."""
    scope = {"__name__": "huggingface_hub.file_download"}
    exec("def xet_get():\n    raise RuntimeError('https://cas.example/?X-Amz-Signature=secret')", scope)
    with pytest.raises(XLFAError) as caught, naming_model("org/name"):
        try:
            scope["xet_get"]()
        except RuntimeError as error:
            raise OSError("Can't load the model for 'org/name'") from error
    assert str(caught.value) == f"--model org/name: the connection to the Hub broke (RuntimeError): {RUN_AGAIN}"


def test_a_full_disk_is_not_taken_for_a_broken_connection():
    full = pytest.raises(XLFAError, match=r"^cannot push: No space left on device \(/cache/part\), on this machine;")
    with full, naming_push_errors("org/name"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/part")
    with pytest.raises(XLFAError, match="the connection to the Hub broke"), naming_push_errors("org/name"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("error", [RuntimeError("sizes differ"), KeyError("weight"), BrokenPipeError(32, "closed")])
def test_errors_of_other_origin_pass(error):
    with pytest.raises(type(error)) as caught, naming_read_errors("--model org/name", "org/name", "no model there"):
        raise error
    assert caught.value is error


def test_a_file_that_may_be_missing_is_not_the_cause_of_what_is_done_without_it():
    """datasets goes on within the handling of the 404 of a script."""
    error = ValueError("another mistake")
    with pytest.raises(ValueError) as caught, naming_read_errors("the data set", "org/name", "none", "dataset"):
        try:
            refused(404, code="EntryNotFound")
        except OSError:
            raise error  # noqa: B904
    assert caught.value is error
