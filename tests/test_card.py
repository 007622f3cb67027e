"""The model card: metadata that the Hub reads, what the text says, markup and paths, and its examples, which run."""

import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml
from conftest import REPOSITORY
from datasets import Dataset
from hub.loopback_hub import LoopbackHub
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoTokenizer

from xlfa.card import (
    TEMPLATE,
    TEMPLATE_METADATA,
    TrainedRun,
    data_licences,
    describe_epsilon,
    describe_limits,
    eval_result_entries,
    render_card,
    training_command,
)
from xlfa.data import SAMPLE_ROOT
from xlfa.environment import processor_name
from xlfa.evaluation import main as evaluate
from xlfa.publishing import read_run, stage
from xlfa.scores import build_scores, write_scores
from xlfa.tasks import Prediction, get_task
from xlfa.training import main as train

SETTINGS = {"data": "hub", "max_examples": None, "seed": 0, "max_length": 128, "doc_stride": 32}
PREDICTIONS = {
    "xquad": [Prediction("a", "Köln", ["Köln"], 0.9), Prediction("b", "Rhein", ["am Rhein"], 0.4)],
    "wikiann": [Prediction("0", ["B-PER", "O"], ["B-PER", "O"], 0.9), Prediction("1", ["O"], ["B-LOC"], 0.5)],
}
# The cards of the models of results/.
COMMITTED = sorted(path for path in TEMPLATE.parent.glob("*.md") if path != TEMPLATE)
CLEAN_PROCESS = """
import importlib.util, json, sys
assert importlib.util.find_spec("modeling_xlfa") is None and importlib.util.find_spec("xlfa") is None
for snippet in json.loads(sys.argv[1]):
    exec(snippet)
    print("---")
"""


@pytest.fixture(scope="module")
def run_folder(tiny_encoder, tmp_path_factory):
    """A run on the sample as if that were a local mirror, scored in three languages."""
    folder = tmp_path_factory.mktemp("runs") / "xnli"
    small = "--max_train_examples 16 --max_eval_examples 9 --max_steps 2 --save_strategy no --seed 3 --bf16 false"
    aligned = "--ot_weight 0.5 --ot_epsilon 0.3 --parallel_dataset local/parallel --parallel_languages de"
    train(
        f"--model {tiny_encoder} --task xnli --data_root {SAMPLE_ROOT} --output_dir {folder} {small} {aligned}".split()
    )
    evaluate(f"--model {folder} --task xnli --data_root {SAMPLE_ROOT} --languages en de fr --max_examples 15".split())
    return folder


@pytest.fixture
def trained(run_folder):
    return read_run(run_folder)


@pytest.fixture(scope="module")
def folders(run_folder, tiny_encoder, tmp_path_factory):
    """Run folders with each head; those of the other heads have an untrained model and made-up predictions."""
    folders = {"xnli": run_folder}
    for name, predictions in PREDICTIONS.items():
        task, folder = get_task(name), tmp_path_factory.mktemp(name)
        labels = {"id2label": dict(enumerate(task.label_names))} if task.label_names else {}
        torch.manual_seed(1)
        model = task.model_class.from_encoder(tiny_encoder, input_length=128, input_stride=32, **labels)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
        run = json.loads((run_folder / "run.json").read_text())
        run["task"] = run["data_arguments"]["task"] = name
        (folder / "run.json").write_text(json.dumps(run))
        languages = {code: predictions for code in ("en", "de", "th")}
        clusters = {code: [0, 1] for code in languages} if not task.parallel else [0, 1]
        splits = dict.fromkeys(languages, task.test_split)
        scores = build_scores(task, languages, clusters, splits, model.config, SETTINGS)
        write_scores(folder / "scores" / name, scores)
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def staged(folders, tmp_path_factory):
    """What would be published of each, by task."""
    staged = {}
    for name, folder in folders.items():
        staged[name] = tmp_path_factory.mktemp(f"staged-{name}")
        stage(read_run(folder), staged[name], f"org/{name}", "v1")
    return staged


def change(trained, **parts):
    """The run with other entries in parts of run.json."""
    run = {**trained.run, **{name: {**trained.run[name], **entries} for name, entries in parts.items()}}
    return TrainedRun(trained.folder, trained.config, run, trained.scores)


def card_of(trained):
    return str(render_card(trained, "org/name", "main"))


def snippet_of(card):
    return re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]


def test_metadata_are_complete_and_read_by_huggingface_hub(staged):
    metadata = metadata_load(staged["xnli"] / "README.md")
    results = metadata.pop("model-index")
    assert metadata == {
        "language": ["de", "en", "fr", "multilingual"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["custom_code", "cross-lingual", "optimal-transport"],
        "datasets": ["facebook/xnli"],
        "metrics": ["accuracy"],
    }
    scores = json.loads((staged["xnli"] / "scores" / "xnli" / "scores.json").read_text())
    name, found = model_index_to_eval_results(results)
    assert name == "xnli" and [result.dataset_config for result in found] == ["en", "de", "fr"]
    for result, values in zip(found, scores["languages"].values(), strict=True):
        assert result.metric_value == round(values["accuracy"], 2)
        assert (result.dataset_type, result.dataset_split, result.metric_type) == ("facebook/xnli", "test", "accuracy")
        assert "local mirror" in result.dataset_name


@pytest.mark.parametrize("name", ["xnli", "xquad", "wikiann"])
def test_results_are_in_the_hubs_format(staged, name):
    scores = json.loads((staged[name] / "scores" / name / "scores.json").read_text())
    entries = parse_eval_result_entries(yaml.safe_load((staged[name] / ".eval_results" / f"{name}.yaml").read_text()))
    task = get_task(name)
    assert [entry.task_id for entry in entries] == [task.test_configs[code] for code in scores["languages"]]
    assert {entry.dataset_id for entry in entries} == {task.test_dataset}
    assert [entry.value for entry in entries] == [
        round(values[task.metrics[0]], 2) for values in scores["languages"].values()
    ]
    assert all(entry.date is None and task.metrics[0] in entry.notes for entry in entries)


def test_results_in_one_configuration_are_told_apart(trained):
    scores = {**trained.scores["xnli"], "dataset": "google-research-datasets/tydiqa"}
    entries = eval_result_entries("tydiqa", scores)
    assert [entry.task_id for entry in entries] == ["secondary_task.en", "de", "fr"]


def test_the_sample_is_not_taken_for_the_data_set(trained):
    scores = json.loads(json.dumps(trained.scores["xnli"]))
    scores["settings"]["data"] = "sample"
    run = change(trained, data_arguments={"data_root": "sample"}).run
    of_sample = TrainedRun(trained.folder, trained.config, run, {"xnli": scores})
    card = card_of(of_sample)
    assert "to try the tool out" in card and "XLFA's sample texts" in card
    assert ModelCard(card).data.datasets is None
    assert all("sample" in result.dataset_name for result in ModelCard(card).data.eval_results)
    assert {entry.task_id for entry in eval_result_entries("xnli", scores)} == {"sample.en", "sample.de", "sample.fr"}
    assert "cc0-1.0" in data_licences(of_sample)[0]["licence"]


def test_the_table_has_every_language_and_mean_with_intervals(trained):
    card, scores = card_of(trained), trained.scores["xnli"]
    for code, values in scores["languages"].items():
        low, high = scores["intervals"]["languages"][code]["accuracy"]
        assert f"| {code} | {values['accuracy']:.2f} ({low:.1f} to {high:.1f}) |" in card
    assert f"| **average** | {scores['average']['accuracy']:.2f} (" in card
    assert "| **average_xtreme** | – |" in card
    assert all(f"| **{name}** |" in card for name in ("enf", "noenf", "transfer_gap"))
    assert "95% intervals" in card and "15 examples a language" in card


def test_the_text_says_how_the_model_came_about(trained, tiny_encoder):
    card = card_of(trained)
    assert "a seeded sample of at most 16 examples, from a local mirror" in card
    assert "| seed | 3 |" in card and "transformers 5" in card
    assert f"| machine | CPU ({processor_name()}), " in card
    assert "ot_epsilon 0.3, in units of ot_epsilon_scale centered_std" in card
    assert "How it was chosen: given to the training command; how it was found is not recorded." in card
    assert "facebook/xnli | training, scoring | cc-by-nc-4.0" in card
    command = training_command(trained)
    assert command.startswith("xlfa train --model ENCODER --ot_weight 0.5 --ot_epsilon 0.3 --task xnli")
    flags = ("--data_root DATA_ROOT", "--max_steps 2", "--seed 3", "--parallel_languages de", "--output_dir RUN_DIR")
    assert all(flag in command for flag in flags)
    assert "num_train_epochs" not in command and "hub_token" not in command
    assert all(path not in card for path in (tiny_encoder, str(SAMPLE_ROOT), str(trained.folder)))


def test_a_folder_is_no_base_model_wherever_the_card_is_written(trained, tmp_path):
    (tmp_path / "encoders" / "greek").mkdir(parents=True)
    run = {**trained.run, "sittings": [{**trained.run["sittings"][-1], "working_directory": str(tmp_path)}]}
    run["model_arguments"] = {**run["model_arguments"], "model": "encoders/greek"}
    assert TrainedRun(trained.folder, trained.config, run, trained.scores).base_model is None


def test_the_steps_of_a_selection_are_in_the_command(trained):
    steps = {"eval_steps": 100, "save_steps": 100}
    assert "--eval_steps" not in training_command(change(trained, training_arguments=steps))
    command = training_command(change(trained, training_arguments={**steps, "load_best_model_at_end": True}))
    assert "--eval_steps 100" in command and "--save_steps 100" in command


def test_the_command_is_that_of_as_many_processes(trained):
    environment = {"accelerators": ["NVIDIA H100"] * 2, "processes": 8}
    run = {**trained.run, "sittings": [{**trained.run["sittings"][-1], "environment": environment}]}
    others = {"use_cpu": False, "early_stopping_patience": 3, "lr_scheduler_kwargs": "{'min_lr_rate': 0.1}"}
    run["training_arguments"] = {**run["training_arguments"], **others}
    several = TrainedRun(trained.folder, trained.config, run, trained.scores)
    command = training_command(several)
    assert command.startswith("accelerate launch --num_processes 8 train_xlfa.py --model ENCODER")
    assert "--early_stopping_patience 3" in command and """--lr_scheduler_kwargs '{"min_lr_rate": 0.1}'""" in command
    assert "| machine | NVIDIA H100, 8 processes |" in card_of(several)


def test_the_type_of_matrix_products_stands_in_the_command_whatever_it_is(trained):
    """Its default is by machine."""
    assert "--bf16 false" in training_command(trained)
    assert "--bf16 true" in training_command(change(trained, training_arguments={"bf16": True}))


def test_a_stricter_licence_can_be_named(trained):
    card = render_card(trained, "org/name", "main", "cc-by-nc-4.0")
    assert card.data.license == "cc-by-nc-4.0" and "its weights are published under cc-by-nc-4.0" in card.text
    assert "its weights are published under apache-2.0" in card_of(trained)


def test_how_epsilon_was_chosen_can_be_told(trained):
    noted = change(trained, model_arguments={"ot_epsilon_note": "by English validation\nof *five* seeds."})
    assert "How it was chosen: by English validation of \\*five\\* seeds." in card_of(noted)
    assert "--ot_epsilon_note" in training_command(noted)


def test_limits_follow_from_the_run(trained):
    packaged = change(
        trained,
        model_arguments={"model": "packaged:multilingual-e5-small", "trim_vocab": True},
        data_arguments={"data_root": None, "max_train_examples": None},
    )
    metadata = ModelCard(card_of(packaged)).data
    assert metadata.base_model == "intfloat/multilingual-e5-small"
    assert metadata.to_dict()["base_model_relation"] == "finetune"
    assert "units, from 4-bit rounded weights)" in card_of(packaged)
    limits = "\n".join(describe_limits(packaged))
    assert "rounded to 4 bits" in limits and "trimmed" in limits and "mirror" not in limits
    limits = "\n".join(describe_limits(trained))
    assert "at most 16 examples" in limits and "local mirror" in limits and "4 bits" not in limits


def test_trained_parameters_are_named(trained):
    assert "| trained parameters | all |" in card_of(trained)
    assert "all but the word embeddings" in card_of(change(trained, model_arguments={"freeze_word_embeddings": True}))
    assert "layers above 3; fusion and head in full" in card_of(change(trained, model_arguments={"freeze_layers": 3}))
    adapted = card_of(change(trained, model_arguments={"peft": "lora", "lora_r": 4}))
    assert "(LoRA), merged into the weights" in adapted and "--peft lora --lora_r 4" in adapted


def test_epsilon_is_described_as_it_was_used(trained):
    default = describe_epsilon(change(trained, model_arguments={"ot_epsilon": None}))
    assert "How it was chosen: the default, not tuned." in default
    assert "given to the training command" in describe_epsilon(trained) and "not tuned" not in describe_epsilon(trained)
    trained.config.ot_solver = "exact"
    assert "does not use the value" in describe_epsilon(trained)
    trained.config.ot_weight = 0.0
    assert "no weight depends on it" in describe_epsilon(trained)


def test_a_wheel_has_the_template_among_its_metadata():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["extra-metadata"]
    assert {f"extra_metadata/{name}": REPOSITORY / path for path, name in shipped.items()} == {
        TEMPLATE_METADATA: TEMPLATE
    }


def test_a_card_is_the_same_every_time(trained, run_folder):
    assert card_of(trained) == card_of(read_run(run_folder))


def test_markup_in_names_is_shown_and_not_obeyed(trained):
    evil = "<script>alert(1)</script>|**x**[y](http://z)\n# h\n```\n---\n{{ 7*7 }}"
    scores = json.loads(json.dumps(trained.scores["xnli"]).replace('"fr"', json.dumps(evil)))
    run = json.loads(json.dumps(trained.run))
    run["versions"]["torch"] = evil
    run["model_arguments"]["encoder_config"] = evil
    card = card_of(TrainedRun(trained.folder, trained.config, run, {"xnli": scores}))
    text = ModelCard(card).text
    assert "<script>" not in text.replace(training_command(TrainedRun(trained.folder, trained.config, run, {})), "")
    row = r"| &lt;script&gt;alert(1)&lt;/script&gt;\|\*\*x\*\*\[y\](http://z) # h \`\`\` --- {{ 7*7 }} |"
    assert row.replace("7*7", r"7\*7") in text
    assert ModelCard(card).data.language == ["de", "en", "multilingual"]
    # The command stands in a fence longer than any in it, and on no line of its own.
    assert "\n````bash\nxlfa train" in text and "\n# h" not in text and "\n---\n{{" not in text


@pytest.fixture(scope="module")
def outputs(staged, tmp_path_factory):
    """What each card's example prints in a process that has torch and transformers, but neither of our packages.

    The weights of the committed cards' models are not in the repository: small ones with the same head stand in.
    """
    heads = {metadata_load(folder / "README.md")["pipeline_tag"]: folder for folder in staged.values()}
    cards = {name: folder / "README.md" for name, folder in staged.items()} | {path.name: path for path in COMMITTED}
    snippets = {name: snippet_of(path.read_text()) for name, path in cards.items()}
    with LoopbackHub() as hub:
        for name, path in cards.items():
            repo_id, revision = re.search(r'name, revision = "(.+)", "(.+)"', snippets[name]).groups()
            folder = heads[metadata_load(path)["pipeline_tag"]]
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            hub.add_repo(repo_id, {name: path.read_bytes() for name, path in files.items()}, tags=[revision])
        site = next(path for path in sys.path if path.endswith("site-packages"))
        environment = hub.client_environment(tmp_path_factory.mktemp("home")) | {"PYTHONPATH": site}
        done = subprocess.run(
            [sys.executable, "-S", "-c", CLEAN_PROCESS, json.dumps(list(snippets.values()))],
            # Nothing is on stdin: an example that asks whether to run the code fails.
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=tmp_path_factory.mktemp("elsewhere"),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return dict(zip(snippets, done.stdout.split("---\n")))


def test_the_examples_run_as_they_stand(outputs):
    assert [line.split(":")[0] for line in outputs["xnli"].splitlines()] == ["entailment", "neutral", "contradiction"]
    assert outputs["xquad"].strip() in "Der Kölner Dom steht in Köln am Rhein. Er wurde 1880 vollendet."
    assert outputs["xquad"].strip()
    words = [line.split()[0] for line in outputs["wikiann"].splitlines()]
    assert words == "Angela Merkel wurde in Hamburg geboren .".split()


def test_the_example_cuts_words_as_training_does(folders, byte_level_tokenizer, tmp_path):
    folder = shutil.copytree(folders["wikiann"], tmp_path / "run")
    byte_level_tokenizer.save_pretrained(folder)
    snippet = snippet_of(card_of(read_run(folder)))
    scope = {"tokenizer": byte_level_tokenizer}
    exec(snippet[snippet.index("words = ") : snippet.index("with torch")], scope)
    rows = Dataset.from_dict({"tokens": [scope["words"]], "ner_tags": [[0] * len(scope["words"])]})
    windows = get_task("wikiann").windows(rows, byte_level_tokenizer, 64, 0)
    assert scope["inputs"]["input_ids"].tolist() == windows["input_ids"][:]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_cards_are_whole_and_their_examples_run(outputs, path):
    assert outputs[path.name].strip()
    metadata = metadata_load(path)
    assert model_index_to_eval_results(metadata["model-index"])[1]
    assert metadata["base_model"] == "intfloat/multilingual-e5-small" and "multilingual" in metadata["language"]
    text = ModelCard(path.read_text()).text
    assert "4 bits" in text and "local mirror" in text and not re.search(r"/(root|home|work|tmp)/", path.read_text())


def test_the_examples_name_repo_and_revision(staged):
    for name, folder in staged.items():
        snippet = snippet_of((folder / "README.md").read_text())
        assert f'name, revision = "org/{name}", "v1"' in snippet and "trust_remote_code=True" in snippet
