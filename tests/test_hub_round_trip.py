"""From Hub ids to a published model and back: train, score, push, delete all that is local, load, score again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hub.loopback_hub import LoopbackHub
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForTokenClassification
from xlfa.data import SAMPLE_ROOT
from xlfa.errors import XLFAError
from xlfa.tasks import get_task
from xlfa.training import main

ENCODER, DATASET, MODEL = "lab/tiny-encoder", "facebook/xnli", "lab/xlfa-tiny-xnli"
TEXTS = ["der hund ist wach", "das tier schläft"]

SCORE_AND_PUSH = """
import sys, torch
from transformers import AutoTokenizer
from modeling_xlfa import XLFAForSequenceClassification
from xlfa.cli import main
run, model = sys.argv[1:3]
main(["eval", "--model", run, "--task", "xnli", "--languages", "de", "en"])
main(["push", run, model, "--revision-tag", "v1"])
inputs = AutoTokenizer.from_pretrained(run)(*sys.argv[3:5], return_tensors="pt")
with torch.no_grad():
    print("LOGITS", XLFAForSequenceClassification.from_pretrained(run)(**inputs).logits[0].tolist())
"""

# Only torch and transformers can be imported. Of the folders that are given, pipelines are made.
LOAD = """
import importlib.util, sys
assert importlib.util.find_spec("modeling_xlfa") is None and importlib.util.find_spec("xlfa") is None
import json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
name = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(name, revision="v1", trust_remote_code=True, ot_epsilon=0.3)
assert model.config.ot_epsilon == 0.3
tokenizer = AutoTokenizer.from_pretrained(name, revision="v1", trust_remote_code=True)
inputs = tokenizer(*sys.argv[2:4], return_tensors="pt")
with torch.no_grad():
    print("LOGITS", model(**inputs).logits[0].tolist())
if sys.argv[4:]:
    classify, tag = (
        pipeline(kind, model=folder, trust_remote_code=True)
        for kind, folder in zip(("text-classification", "token-classification"), sys.argv[4:])
    )
    assert type(classify.model).__module__.startswith("transformers_modules.")
    classes = classify({"text": sys.argv[2], "text_pair": sys.argv[3]}, top_k=None)
    print("CLASSES", json.dumps({each["label"]: each["score"] for each in classes}))
    print("TAGS", json.dumps([[each["entity"], float(each["score"])] for each in tag(sys.argv[2])]))
"""


def run_client(command, environment, folder):
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def found_in(output, name):
    (line,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
    return json.loads(line.removeprefix(f"{name} "))


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tiny_encoder):
    """A Hub with an encoder and the sample's XNLI."""
    with LoopbackHub() as hub:
        hub.add_repo(ENCODER, files_below(Path(tiny_encoder)))
        hub.add_repo(DATASET, files_below(SAMPLE_ROOT / DATASET), repo_type="dataset")
        yield hub


@pytest.fixture
def tagger(tiny_encoder, tmp_path):
    """A folder with a model and its tokenizer, and what they give to the first text: a tag and its probability each."""
    model = XLFAForTokenClassification.from_encoder(tiny_encoder, num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "tagger")
    inputs = tokenizer(TEXTS[0], return_tensors="pt", return_special_tokens_mask=True)
    is_special = inputs.pop("special_tokens_mask")[0].bool()
    with torch.no_grad():
        probability, label = model(**inputs).logits[0, ~is_special].softmax(-1).max(-1)
    return tmp_path / "tagger", [model.config.id2label[number] for number in label.tolist()], probability.tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--push_to_hub needs the name of the repo: --hub_model_id org/name"),
        (["--hub_model_id", "name"], "'name' is no repo id such as org/name"),
        (["--hub_model_id", "org/name"], "no token for the Hub"),
        (["--hub_model_id", "org/name", "--hub_token", "secret"], "--hub_token would be seen by others"),
        (["--hub_model_id", "org/name", "--hub_strategy", "checkpoint"], "--hub_strategy does not apply"),
    ],
)
def test_what_publishing_lacks_is_said_before_the_training(tiny_encoder, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("xlfa.publishing.get_token", lambda: None)
    run = str(tmp_path / "run")
    with pytest.raises(XLFAError) as error:
        main(["--model", tiny_encoder, "--task", "xnli", "--output_dir", run, "--push_to_hub", *flags])
    assert message in str(error.value) and "secret" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_model_trained_from_hub_ids_is_published_and_comes_back_the_same(hub, tagger, tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    environment = hub.client_environment(home)
    flags = f"--model {ENCODER} --task xnli --max_steps 3 --save_strategy no --output_dir run"
    flags += f" --push_to_hub --hub_model_id {MODEL}"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    logs = run_client([*launch, str(REPOSITORY / "train_xlfa.py"), *flags.split()], environment, work)
    assert len(hub.commits(MODEL)) == 2 and "average_xtreme" in logs
    # Scoring fewer languages into this folder would be refused.
    shutil.rmtree(work / "run" / "scores")
    logs += run_client([sys.executable, "-c", SCORE_AND_PUSH, "run", MODEL, *TEXTS], environment, work)
    logits = found_in(logs, "LOGITS")
    scores = json.loads((work / "run" / "scores" / "xnli" / "scores.json").read_text())
    # With the tag in its card, and the scores of two languages, it is another publication.
    assert len(hub.commits(MODEL)) == 3 and list(hub.tags(MODEL)) == ["v1"]

    shutil.copytree(work / "run", tmp_path / "classifier")
    shutil.rmtree(work)
    shutil.rmtree(home)
    work.mkdir()
    site = next(path for path in sys.path if path.endswith("site-packages"))
    clean = {name: value for name, value in hub.client_environment(home, token=False).items() if name != "PYTHONPATH"}
    clean |= {"PYTHONPATH": site}
    folder, tags, tag_scores = tagger
    # Once over the network, then from the cache and from folders alone.
    for extra, folders in (({}, []), ({"HF_HUB_OFFLINE": "1"}, [str(tmp_path / "classifier"), str(folder)])):
        output = run_client([sys.executable, "-S", "-c", LOAD, MODEL, *TEXTS, *folders], clean | extra, work)
        np.testing.assert_allclose(found_in(output, "LOGITS"), logits, atol=1e-6)
    classes, probabilities = found_in(output, "CLASSES"), torch.tensor(logits).softmax(0).tolist()
    assert classes == pytest.approx(dict(zip(get_task("xnli").label_names, probabilities)), abs=1e-5)
    assert [tag for tag, _ in found_in(output, "TAGS")] == tags
    assert [score for _, score in found_in(output, "TAGS")] == pytest.approx(tag_scores, abs=1e-5)

    evaluate = [sys.executable, str(REPOSITORY / "eval_xlfa.py"), "--model", MODEL, "--task", "xnli"]
    logs += run_client([*evaluate, "--languages", "de", "en"], environment, work)
    again = json.loads((work / MODEL.replace("/", "--") / "scores" / "xnli" / "scores.json").read_text())
    # A local folder's scores tell its weights as well.
    assert len(scores["model"].pop("weights")) == 64 and again == scores

    assert hub.token not in logs
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or hub.token.encode() not in path.read_bytes(), path
    published = hub.repo(MODEL).resolve("v1").files
    for name, file in published.items():
        for secret in (hub.token, str(tmp_path), os.path.expanduser("~")):
            assert secret.encode() not in file.content, (name, secret)
