"""No pickle that comes with a model is unpickled, and no code that comes with one runs."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from hub.loopback_hub import LoopbackHub
from test_checkpoints import train
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer
from vocabulary_encoders import KEPT, OTHER, wordpiece_backend

from modeling_xlfa import XLFAConfig, XLFAForQuestionAnswering, XLFAForSequenceClassification, XLFAModel
from xlfa import cli
from xlfa.adapters import add_adapters, load_adapter
from xlfa.alignment.aligner import Aligner
from xlfa.app.commands import _load_question_model, _parser
from xlfa.arguments import ModelArguments
from xlfa.errors import XLFAError, exit_with_message
from xlfa.retrieval import DATASET as TATOEBA
from xlfa.study.grid import check_models, load_plan

COMMANDS = {
    "train": "--task xnli --data_root sample --output_dir {place}/run --max_train_examples 2 --max_eval_examples 3 "
    "--max_steps 1 --eval_strategy no --save_strategy no --max_length 16",
    "eval": "--task xnli --data_root sample --languages en --max_examples 3 --max_length 16",
    "predict": "--question who --context cat",
    "align": "cat Kater",
    "retrieval": "--data_root {data} --languages de",
    "rankc": "--data_root {data} --languages en nl --dataset local/prompts",
    "rankc --scoring masked_lm": "--data_root {data} --languages en nl --dataset local/prompts",
    "vocab trim": "--texts {data}/text.txt --output_dir {place}/trimmed",
}
# Every command that reads weights, with what it takes as its model: a plain encoder or a trained head.
READERS = [
    ("train", "encoder"),
    ("eval", "xnli"),
    ("predict", "xquad"),
    ("align", "encoder"),
    ("align", "xnli"),
    ("retrieval", "encoder"),
    ("retrieval", "xnli"),
    ("rankc", "encoder"),
    ("rankc", "xnli"),
    ("rankc --scoring masked_lm", "encoder"),
    ("vocab trim", "encoder"),
    ("app", "encoder"),
    ("app", "xquad"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models that every command takes: the encoder has a masked-language head and a WordPiece tokenizer."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("encoder", "xnli", "xquad")}
    tokenizer = BertTokenizer(tokenizer_object=wordpiece_backend(), model_max_length=128)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    torch.manual_seed(0)
    BertForMaskedLM(encoder).save_pretrained(folders["encoder"])
    XLFAForSequenceClassification.from_encoder(folders["encoder"], num_labels=3).save_pretrained(folders["xnli"])
    lengths = {"input_length": 96, "input_stride": 16}
    XLFAForQuestionAnswering.from_encoder(folders["encoder"], **lengths).save_pretrained(folders["xquad"])
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A mirror with sentences for `xlfa retrieval` and queries for `xlfa rankc`, and a text for `xlfa vocab`."""
    root = tmp_path_factory.mktemp("data")
    (root / "text.txt").write_text("\n".join(KEPT), encoding="utf-8")
    sentences = Dataset.from_dict({"sentence1": KEPT, "sentence2": OTHER})
    queries = Dataset.from_dict({"prompt": ["The <mask> sat."], "candidates": [["cat", "dog"]]})
    for dataset, rows, configs in ((TATOEBA, sentences, ["deu-eng"]), ("local/prompts", queries, ["en", "nl"])):
        folder = root / dataset
        files = [{"config_name": name, "data_files": [{"split": "test", "path": "rows.parquet"}]} for name in configs]
        folder.mkdir(parents=True)
        rows.to_parquet(folder / "rows.parquet")
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': files})}---\n")
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of datasets for this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xlfa.data.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def marker(tmp_path):
    """A file that is there once something ran that must not."""
    return tmp_path / "marker"


@pytest.fixture
def run(data, tmp_path, capsys):
    """Runs a command on a model; returns what it printed as its error, None if it came to its end."""

    def app(argv):
        pytest.importorskip("gradio")
        _load_question_model(_parser().parse_args(argv), Aligner.from_pretrained(argv[-1]))

    def study(argv):
        content = {"name": "s", "output_dir": "s", "seeds": [0], "train": {"model": argv[-1]}, "tasks": {"xnli": {}}}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content | {"grid": {"fusion": ["none"]}}))
        check_models(load_plan(path))

    def run(command, model):
        others = {"app": app, "study": study}
        flags = COMMANDS.get(command, "").format(data=data, place=tmp_path).split()
        argv = [*command.split(), *flags, "--model", str(model)]
        try:
            exit_with_message(others[command], argv[1:]) if command in others else cli.main(argv)
        except SystemExit as end:
            assert end.code == 2
            shown = capsys.readouterr().err
            (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in shown
            return error
        return None

    return run


# Pickles


class Marking:
    """Writes the marker where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def write_pickle(path, marker):
    path.write_bytes(pickle.dumps({"weight": Marking(marker)}))


def test_the_pickle_of_these_tests_writes_the_marker(tmp_path, marker):
    write_pickle(tmp_path / "pytorch_model.bin", marker)
    with pytest.raises(RuntimeError, match="Invalid magic number"):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(("command", "kind"), READERS)
def test_weights_in_a_pickle_are_refused(models, run, tmp_path, marker, command, kind):
    model = shutil.copytree(models[kind], tmp_path / "model")
    (model / "model.safetensors").unlink()
    write_pickle(model / "pytorch_model.bin", marker)
    error = run(command, model)
    assert f"--model {model}: " in error and "no file named model.safetensors" in error
    assert not marker.exists()


@pytest.mark.parametrize(("command", "kind"), READERS)
def test_a_config_that_names_a_pickle_is_refused(models, run, tmp_path, marker, command, kind):
    """transformers would load that file, though it is told to read safetensors alone."""
    model = shutil.copytree(models[kind], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    write_pickle(model / "adapter_model.bin", marker)
    assert "transformers_weights='adapter_model.bin' is not allowed" in run(command, model)
    assert not marker.exists()


@pytest.fixture(scope="module")
def pickled_adapter(models, tmp_path_factory):
    """A folder of adapters as PEFT saves them without safetensors."""
    folder = tmp_path_factory.mktemp("adapter")
    head = XLFAForSequenceClassification.from_encoder(models["encoder"], num_labels=3)
    adapted = add_adapters(head, ModelArguments(model="lab/encoder", peft="lora"))
    adapted.save_pretrained(folder, safe_serialization=False)
    adapted.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models["encoder"]).save_pretrained(folder)
    assert (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists()
    return folder


def test_adapters_in_a_pickle_are_refused(models, pickled_adapter):
    with pytest.raises(
        XLFAError, match=f"{pickled_adapter} holds adapters without adapter_model.safetensors; a pickle"
    ):
        load_adapter(XLFAForSequenceClassification, str(pickled_adapter), str(models["encoder"]))


LOAD_BY_NAME = """
from modeling_xlfa import XLFAForSequenceClassification
from xlfa.adapters import load_adapter
load_adapter(XLFAForSequenceClassification, "lab/adapter")
"""


def test_adapters_in_a_pickle_on_the_hub_are_refused_and_not_downloaded(models, pickled_adapter, tmp_path):
    with LoopbackHub() as hub:
        for name, folder in (("lab/encoder", models["encoder"]), ("lab/adapter", pickled_adapter)):
            hub.add_repo(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        done = subprocess.run(
            [sys.executable, "-c", LOAD_BY_NAME],
            env=hub.client_environment(tmp_path / "home"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert "lab/adapter holds adapters without adapter_model.safetensors" in done.stderr
        assert hub.sent(path_contains="adapter_model.safetensors") and not hub.sent(path_contains="adapter_model.bin")


@pytest.mark.parametrize("flags", [[], ["--peft", "lora"]])
def test_a_resumed_run_unpickles_tensors_and_plain_values_alone(models, tmp_path, monkeypatch, flags):
    settings = [*flags, "--ot_weight", "0", "--max_steps", "2", "--save_steps", "1"]
    train(str(models["encoder"]), tmp_path, *settings)
    shutil.rmtree(tmp_path / "checkpoint-2")
    read, load = [], torch.load

    def load_plain_values(file, *args, **options):
        assert options.get("weights_only") is True, file
        read.append(Path(file).name)
        return load(file, *args, **options)

    def refuse(*args, **options):
        raise AssertionError("a pickle is read")

    monkeypatch.setattr(torch, "load", load_plain_values)
    for name in ("Unpickler", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    train(str(models["encoder"]), tmp_path, *settings, "--resume_from_checkpoint", "true")
    assert sorted(read) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]


# Code


@pytest.fixture
def with_code(models, tmp_path, marker, monkeypatch):
    """Copies a model's folder and adds code that its files point at; whoever is asked says that it may run."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def copy(kind, files=("config.json", "tokenizer_config.json"), unknown=None):
        folder = shutil.copytree(models[kind], tmp_path / "model")
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
        heads = ("", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering")
        code = dict.fromkeys(("AutoConfig", *(f"AutoModel{head}" for head in heads)), "evil.Model")
        for name in files:
            content = json.loads((folder / name).read_text())
            content["auto_map"] = code | {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
            if "text_config" in content:
                content["text_config"]["auto_map"] = content["auto_map"]
            if unknown in content:
                content[unknown] = "Evil"
            (folder / name).write_text(json.dumps(content))
        return folder

    return copy


@pytest.mark.parametrize(("auto", "file"), [("AutoConfig", "config.json"), ("AutoTokenizer", "tokenizer_config.json")])
def test_the_code_of_these_tests_writes_the_marker_where_it_is_trusted(with_code, marker, auto, file):
    folder = with_code("encoder", [file])
    with pytest.raises(AttributeError, match="evil"):
        getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_code_of_an_encoder_without_a_class_does_not_run(tmp_path, marker, monkeypatch):
    """transformers has the config of this type, and no model for AutoModel."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = transformers.SiglipTextConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    config.auto_map, config.name_or_path = {"AutoModel": "evil.Model"}, str(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        XLFAModel(XLFAConfig(text_config=config))
    assert not marker.exists()


@pytest.mark.parametrize("unknown", [None, "model_type", "tokenizer_class"])
@pytest.mark.parametrize(("command", "kind"), [*READERS, ("study", "encoder")])
def test_code_in_a_folder_does_not_run(with_code, run, marker, command, kind, unknown):
    """What is known is built by the installed classes; a model of another type is refused."""
    folder = with_code(kind, unknown=unknown)
    error = run(command, folder)
    assert not marker.exists()
    if unknown is None:
        assert error is None
    elif unknown == "model_type":
        assert f"--model {folder}: " in error and "custom code" in error
