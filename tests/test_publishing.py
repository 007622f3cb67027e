"""`xlfa push` to a loopback Hub: what is published, pushing again, tags, faults, bad input, and hostile run folders.

One client process makes all pushes: huggingface_hub reads HF_ENDPOINT when it is imported. The tests look at what came
of each.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub.loopback_hub import Fault, LoopbackHub
from safetensors.torch import load_file, save_file

import modeling_xlfa
from modeling_xlfa.configuration_xlfa import AUTO_MAP
from xlfa import publishing, training
from xlfa.cli import main
from xlfa.errors import XLFAError
from xlfa.evaluation import main as evaluate
from xlfa.publishing import push, read_run, stage

CODE = {path.name for path in Path(modeling_xlfa.__file__).parent.glob("*_xlfa.py")}
PUBLISHED = CODE | {
    *("README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *(".eval_results/xnli.yaml", "scores/xnli/scores.json"),
}
CLIENT = """
import contextlib, io, json, os, sys
from xlfa.cli import main
outcomes = {}
for name, arguments, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(["push", *arguments])
        except SystemExit as done:
            status = done.code
    outcomes[name] = {"status": status, "output": output.getvalue(), "errors": errors.getvalue()}
json.dump(outcomes, sys.stdout)
"""
LOAD = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
options = {"revision": "v1", "trust_remote_code": True}
model = AutoModelForSequenceClassification.from_pretrained("org/model", **options).eval()
with torch.inference_mode():
    json.dump(model(input_ids=torch.arange(1, 21)[None]).logits[0].tolist(), sys.stdout)
"""


@dataclass
class Case:
    """A fault in a push, and what the message says (None: the client recovers by itself)."""

    fault: Fault
    method: str
    path: str
    says: str | None = None


# The first push to a repo meets the fault, the second one does not. All have the tag v1.
FAULTS = {
    "create-unavailable": Case(Fault.unavailable(), "POST", "/api/repos/create", "is not available (503)"),
    "create-unauthorized": Case(Fault.unauthorized(), "POST", "/api/repos/create", "does not accept the token"),
    "preupload-unavailable": Case(Fault.unavailable(), "POST", "/preupload-unavailable/preupload/"),
    "lfs-cut": Case(Fault.cut(), "PUT", "/storage/models/org/lfs-cut/"),
    "commit-unavailable": Case(Fault.unavailable(), "POST", "/commit-unavailable/commit/", "is not available (503)"),
    "commit-conflict": Case(Fault.conflict(), "POST", "/commit-conflict/commit/", "another commit is being made"),
    "commit-unauthorized": Case(Fault.unauthorized(), "POST", "/commit-unauthorized/commit/", "hf auth login"),
    "commit-cut": Case(Fault.cut(), "POST", "/commit-cut/commit/", "the connection to the Hub broke"),
    "tag-unavailable": Case(Fault.unavailable(), "POST", "/tag-unavailable/tag/", "is not available (503)"),
    # The tag is set and the client does not know.
    "tag-cut": Case(Fault.cut(), "POST", "/tag-cut/tag/", "the connection to the Hub broke"),
}


@pytest.fixture(scope="module")
def run_folder(tiny_encoder, tmp_path_factory):
    """A run on the sample with a checkpoint, scored in two languages, and files that concern nobody."""
    folder = tmp_path_factory.mktemp("runs") / "xnli"
    small = "--max_train_examples 16 --max_eval_examples 9 --max_steps 1 --save_strategy steps --save_steps 1"
    training.main(f"--model {tiny_encoder} --task xnli --data_root sample --output_dir {folder} {small}".split())
    scored = "--languages en de --max_examples 15"
    evaluate(f"--model {folder} --task xnli --data_root sample {scored}".split())
    torch.save({"weights": torch.ones(1)}, folder / "pytorch_model.bin")
    (folder / "notes.txt").write_text("not for the public")
    return folder


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(read_only=["google"]) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushes(hub, run_folder, tmp_path_factory):
    """The outcomes of pushes by the command line, each name → its arguments after the run folder."""
    old = {".eval_results/mlqa.yaml": "[]", "scores/mlqa/scores.json": "{}", "notes.md": "mine"}
    old |= {".eval_results/gsm8k.yaml": "[]", "scores/mine/scores.json": "{}"}
    hub.add_repo("org/older", old)
    hub.add_repo("org/tagged", {"README.md": "something else"}, tags=["v1"])
    hub.add_repo("org/public", {"README.md": "for all"})
    hub.add_repo("google/bert", {"README.md": "BERT"})
    calls = {
        "first": "org/model --revision-tag v1",
        "again": "org/model --revision_tag v1",
        "no tag": "org/untagged",
        "no tag again": "org/untagged",
        "other tag": "org/untagged --revision-tag v2",
        "older": "org/older",
        "private": "org/secret --private",
        "pull request": "google/bert --create-pr",
        "tagged": "org/tagged --revision-tag v1",
        "public": "org/public --private",
        "read-only": "google/bert",
        "read-only, new": "google/new",
        "no repo": "org/none --create_pr",
        "no token": "org/none",
        "wrong token": "org/none",
    }
    calls |= {name: f"org/{name} --revision-tag v1" for name in FAULTS}
    calls |= {f"{name} again": calls[name] for name in FAULTS}
    for case in FAULTS.values():
        hub.fail(case.fault, method=case.method, path_contains=case.path)
    # Creating a repo has the same address for all: those two come first.
    first = sorted(calls, key=lambda name: name not in ("create-unavailable", "create-unauthorized"))
    tokens = {"no token": "", "wrong token": "hf_wrong"}
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(
            [(name, [str(run_folder), *calls[name].split()], tokens.get(name, hub.token)) for name in first]
        ),
        env=hub.client_environment(home),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not any(hub.token.encode() in path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert hub.token not in done.stdout + done.stderr
    return json.loads(done.stdout)


def published(hub, repo_id, revision="main"):
    return {name: hub.read_file(repo_id, name, revision) for name in hub.list_files(repo_id, revision)}


def test_a_push_is_one_commit_and_a_tag(hub, pushes):
    commit, _ = hub.commits("org/model")
    assert pushes["first"] == {
        "status": 0,
        "output": f"published: {hub.endpoint}/org/model/commit/{commit.oid}\n",
        "errors": pushes["first"]["errors"],
    }
    assert hub.tags("org/model") == {"v1": commit.oid}
    assert set(published(hub, "org/model")) == PUBLISHED | {".gitattributes"}


def test_an_unchanged_push_makes_no_commit(hub, pushes):
    assert pushes["again"]["output"] == pushes["first"]["output"]
    assert pushes["no tag"]["output"] == pushes["no tag again"]["output"] != ""
    assert len(hub.sent("POST", "/api/models/org/model/commit/")) == 1
    # The card shows another revision: that is a change.
    assert pushes["other tag"]["status"] == 0 and len(hub.commits("org/untagged")) == 3
    assert b'"org/untagged", "v2"' in hub.read_file("org/untagged", "README.md", "v2")


def test_scores_that_a_run_no_longer_has_are_removed_and_other_files_stay(hub, pushes):
    assert pushes["older"]["status"] == 0 and len(hub.commits("org/older")) == 3
    assert set(published(hub, "org/older")) == PUBLISHED | {
        *(".gitattributes", "notes.md", ".eval_results/gsm8k.yaml", "scores/mine/scores.json"),
    }


def test_privacy_is_as_asked(hub, pushes):
    assert hub.repo("org/secret").private and not hub.repo("org/model").private
    assert pushes["public"]["status"] == 2 and "exists and is public" in pushes["public"]["errors"]
    assert len(hub.commits("org/public")) == 2


def test_a_pull_request_leaves_main_alone(hub, pushes):
    assert "/discussions/1" in pushes["pull request"]["output"]
    assert set(published(hub, "google/bert", "refs/pr/1")) >= PUBLISHED
    assert hub.read_file("google/bert", "README.md") == b"BERT"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tagged", "--revision-tag v1: org/tagged has this tag on other files"),
        ("read-only", "this token may not write to google/bert (403)"),
        ("read-only, new", "this token may not write to google/new (403)"),
        ("no repo", "no repo org/none on the Hub"),
        ("no token", "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"),
        ("wrong token", "does not accept the token for org/none (401)"),
    ],
)
def test_a_refusal_is_one_line_that_names_cause_and_remedy(hub, pushes, name, message):
    outcome = pushes[name]
    assert outcome["status"] == 2 and outcome["output"] == ""
    (line,) = [line for line in outcome["errors"].splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in outcome["errors"]
    assert len(hub.commits("org/tagged")) == 2 and len(hub.commits("google/bert")) == 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_a_second_push_ends_in_one_commit(hub, pushes, name):
    first, again = pushes[name], pushes[f"{name} again"]
    says = FAULTS[name].says
    assert first["status"] == (0 if says is None else 2)
    if says is not None:
        (line,) = [line for line in first["errors"].splitlines() if line.startswith("error: ")]
        assert says in line
    assert again["status"] == 0, again["errors"]
    (commit, _), tags = hub.commits(f"org/{name}"), hub.tags(f"org/{name}")
    assert tags == {"v1": commit.oid}
    # Weights that have arrived are not sent again.
    assert len(hub.sent("PUT", f"/storage/models/org/{name}/")) == (2 if name == "lfs-cut" else 1)
    assert set(published(hub, f"org/{name}")) == PUBLISHED | {".gitattributes"}


def test_no_pickle_token_or_local_path_is_published(hub, pushes, run_folder, tiny_encoder):
    files = published(hub, "org/model")
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    for name, content in files.items():
        for secret in (hub.token, str(run_folder), str(run_folder.parent), tiny_encoder, str(Path.cwd()), "/tmp/"):
            assert secret.encode() not in content, (name, secret)


def test_the_published_config_has_epsilon_and_own_code(hub, pushes):
    files = published(hub, "org/model")
    config = json.loads(files["config.json"])
    assert (config["ot_epsilon"], config["ot_epsilon_scale"]) == (0.1, "centered_std")
    assert config["auto_map"] == AUTO_MAP
    assert "_name_or_path" not in config["text_config"]
    assert {"is_local", "local_files_only"}.isdisjoint(json.loads(files["tokenizer_config.json"]))
    for name in CODE:
        assert files[name] == (Path(modeling_xlfa.__file__).parent / name).read_bytes()
    scores = json.loads(files["scores/xnli/scores.json"])
    assert scores["schema_version"] == 3 and "predictions" not in scores


def test_a_pushed_model_gives_the_same_logits_by_id(hub, pushes, run_folder, tmp_path):
    """In a process that has torch and transformers, but neither of our packages."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", LOAD],
        env=hub.client_environment(tmp_path, token=False) | {"PYTHONPATH": site},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    model = modeling_xlfa.XLFAForSequenceClassification.from_pretrained(run_folder).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.arange(1, 21)[None]).logits[0]
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


# Bad input and hostile folders: found before anything is sent


@pytest.fixture
def copy(run_folder, tmp_path):
    """A run folder to spoil."""
    return shutil.copytree(run_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("name", {}, "put your user name or organisation in front"),
        ("a/b/c", {}, "'a/b/c' is no repo id such as org/name"),
        ("org/..", {}, "'org/..' is no repo id"),
        ("org/na me", {}, "'org/na me' is no repo id"),
        ("org/name", {"revision_tag": "main"}, "--revision-tag 'main' is no tag"),
        ("org/name", {"revision_tag": 'v1", "x'}, "is no tag"),
        ("org/name", {"revision_tag": "v1", "create_pr": True}, "a pull request has no tag"),
    ],
)
def test_bad_names(run_folder, repo_id, options, message):
    with pytest.raises(XLFAError, match=message):
        push(run_folder, repo_id, **options)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(XLFAError, match="no run folder .*nowhere: give the --output_dir of a training run"):
        push(tmp_path / "nowhere", "org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "has no weights .*pickles are not published"),
        ("tokenizer.json", "holds no tokenizer"),
        ("config.json", "cannot read .*config.json: No such file"),
        ("run.json", "cannot read .*run.json: No such file"),
        ("scores/xnli/scores.json", "score the model with `xlfa eval` first"),
    ],
)
def test_a_folder_that_lacks_a_part(copy, name, message):
    (copy / name).unlink()
    with pytest.raises(XLFAError, match=message):
        read_run(copy)


def test_an_adapter_is_left_to_peft(copy):
    (copy / "model.safetensors").unlink()
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(XLFAError, match="publish it with `hf upload`"):
        read_run(copy)


def test_a_pickle_under_the_name_of_safetensors(copy):
    shutil.copyfile(copy / "pytorch_model.bin", copy / "model.safetensors")
    with pytest.raises(XLFAError, match="is no safetensors file"):
        read_run(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores["model"].update(ot_epsilon=0.7), "of another model: .*ot_epsilon=0.7, this one has 0.1"),
        (lambda scores: scores["model"].update(encoder="xlm-roberta"), "of another model: .*encoder='xlm-roberta'"),
        (lambda scores: scores["model"].update(weights="0" * 64), "of another model: .*weights='0000"),
        (lambda scores: scores.update(schema_version=2), "schema_version 2, not 3: score the model again"),
        (lambda scores: scores.update(task="xquad"), "the folder must have the name of a known task"),
        (lambda scores: scores.pop("intervals"), "is no scores.json as `xlfa eval` writes it"),
        (lambda scores: scores.update(languages={"de": {"accuracy": "<b>"}}), "is no scores.json"),
    ],
)
def test_scores_that_do_not_belong_to_the_model(copy, change, message):
    edit(copy / "scores" / "xnli" / "scores.json", change)
    with pytest.raises(XLFAError, match=message):
        read_run(copy)


def test_scores_of_weights_that_were_trained_on(copy):
    weights = load_file(copy / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(XLFAError, match="of another model: it was scored with weights="):
        read_run(copy)


def test_scores_of_a_task_with_another_head(copy):
    (copy / "scores" / "xnli").rename(copy / "scores" / "xquad")
    edit(copy / "scores" / "xquad" / "scores.json", lambda scores: scores.update(task="xquad"))
    with pytest.raises(XLFAError, match="needs XLFAForQuestionAnswering; the model's head is XLFAForSequence"):
        read_run(copy)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.json", lambda run: run.update(task="unknown"), "is of the task 'unknown'; there are: xnli"),
        ("run.json", lambda run: run.pop("versions"), "is no run.json as training writes it"),
        ("config.json", lambda config: config.update(model_type="bert"), "is of a 'bert' model"),
        ("config.json", lambda config: config.update(ot_epsilon=-1), "ot_epsilon=-1 is not allowed"),
        (
            "config.json",
            lambda config: config["auto_map"].update(AutoModel="other/repo--modeling.Evil"),
            "auto_map points AutoModel at 'other/repo--modeling.Evil'",
        ),
        (
            "config.json",
            lambda config: config.update(auto_map="evil.Model"),
            "auto_map points auto_map at 'evil.Model'",
        ),
        (
            "config.json",
            lambda config: config["text_config"].update(auto_map={"AutoModel": "evil.Model"}),
            "auto_map names code",
        ),
        (
            "config.json",
            lambda config: config.update(custom_pipelines={"x": {"impl": "evil.Pipeline"}}),
            "custom_pipelines names code",
        ),
    ],
)
def test_a_config_or_run_file_that_is_not_ours(copy, name, change, message):
    edit(copy / name, change)
    with pytest.raises(XLFAError, match=message):
        read_run(copy)


def stage_copy(copy, tmp_path):
    folder = tmp_path / "staged"
    folder.mkdir()
    stage(read_run(copy), folder, "org/name", "main")
    return folder


def test_a_tokenizer_that_names_code(copy, tmp_path):
    edit(copy / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["o/r--t.T", None]}))
    with pytest.raises(XLFAError, match="tokenizer_config.json: auto_map names code"):
        stage_copy(copy, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "scores"])
def test_a_link_out_of_the_folder_is_not_followed(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(XLFAError, match="leads out of the run folder"):
        stage_copy(copy, tmp_path)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "sub/x.safetensors", "model.bin", 3])
def test_an_index_that_names_other_files(copy, tmp_path, shard):
    shutil.copyfile(copy / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(XLFAError, match="which is no weight file beside it"):
        read_run(copy)


def test_shards_are_published_with_their_index(copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"classifier.weight": "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    names = {path.name for path in stage_copy(copy, tmp_path).iterdir()}
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= names


def test_code_in_the_run_folder_is_neither_run_nor_published(copy, tmp_path):
    (copy / "modeling_xlfa.py").write_text("raise SystemExit('run')")
    (copy / "evil_xlfa.py").write_text("raise SystemExit('run')")
    folder = stage_copy(copy, tmp_path)
    assert {path.name for path in folder.glob("*.py")} == CODE
    assert "SystemExit('run')" not in (folder / "modeling_xlfa.py").read_text()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda config: config.update(note="/home/someone/secret/model")),
        ("tokenizer_config.json", lambda config: config.update(vocab_file="../../secret/vocab.txt")),
        ("scores/xnli/scores.json", lambda scores: scores["settings"].update(root="C:\\Users\\someone")),
    ],
)
def test_a_local_path_is_not_published(copy, tmp_path, name, change):
    edit(copy / name, change)
    with pytest.raises(XLFAError, match=f"{Path(name).name}: .* would publish the local path"):
        stage_copy(copy, tmp_path)


def test_a_path_of_the_training_run_is_found_in_every_file(copy, tmp_path):
    edit(copy / "run.json", lambda run: run["data_arguments"].update(data_root="/data/of/mine"))
    edit(copy / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update({"x/data/of/mine": 98}))
    with pytest.raises(XLFAError, match="tokenizer.json would publish the local path '/data/of/mine'"):
        stage_copy(copy, tmp_path)


def test_weights_are_linked_and_nothing_is_left_behind(copy, tmp_path, monkeypatch):
    folder = stage_copy(copy, tmp_path)
    assert (folder / "model.safetensors").samefile(copy / "model.safetensors")
    monkeypatch.setattr(publishing, "get_token", lambda: "hf_token")
    before = sorted(copy.parent.iterdir())
    # The tests are offline.
    with pytest.raises(XLFAError, match="HF_HUB_OFFLINE is set"):
        push(copy, "org/name")
    assert sorted(copy.parent.iterdir()) == before


def test_a_dry_run_writes_what_would_be_published_and_pushes_nothing(copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", None)
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    target = tmp_path / "publication"
    main(["push", str(copy), "org/model", "--revision-tag", "v1", "--dry-run", str(target)])
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert {"README.md", "model.safetensors", "scores/xnli/scores.json", ".eval_results/xnli.yaml"} <= names
    assert 'name, revision = "org/model", "v1"' in (target / "README.md").read_text()
    assert "nothing was pushed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["push", str(copy), "org/model", "--dry-run", str(target)])
    assert f"--dry-run {target} exists" in capsys.readouterr().err


def test_help_explains_the_arguments(capsys):
    with pytest.raises(SystemExit) as done:
        main(["push", "--help"])
    output = capsys.readouterr().out
    assert done.value.code == 0 and "HF_TOKEN" in output
    assert all(name in output for name in ("RUN_DIR", "ORG/NAME", "--private", "--revision-tag", "--create-pr"))
