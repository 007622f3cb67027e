"""Models that the newest transformers saved load in this version from the code beside them, and do the same.

Runs where nothing but torch and transformers can be imported; `save_models.py` saves the models.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

SAVED = Path(__file__).resolve().parents[2] / ".compat" / "saved" / "models"
HEADS = {
    "qa": AutoModelForQuestionAnswering,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
MODELS = sorted(path.name for path in SAVED.iterdir() if path.is_dir())
DEFAULTS = [name for name in MODELS if name.endswith(".dlfa")]
PLAIN = [name for name in MODELS if name.endswith(".none")]
CODE = {
    f"{part}_xlfa.py"
    for part in ("configuration", "modeling", "fusion", "outputs", "transport", "sinkhorn", "sinkhorn_triton")
}


class Saved:
    """A saved model: its folder, and inputs and outputs from where it was saved."""

    def __init__(self, name):
        self.folder = SAVED / name
        self.encoder, head, self.fusion = name.split(".")
        self.auto_class = HEADS[head]
        tensors = load_file(f"{self.folder}.safetensors")
        self.inputs = {key.removeprefix("input/"): value for key, value in tensors.items() if key.startswith("input/")}
        self.outputs = {
            key.removeprefix("output/"): value for key, value in tensors.items() if key.startswith("output/")
        }

    def pairs(self):
        return {key: value for key, value in self.inputs.items() if key.startswith(("source", "target"))}

    def task(self):
        return {key: self.inputs[key] for key in ("input_ids", "attention_mask")}

    def load(self, auto_class=None, folder=None, **options):
        auto_class = auto_class or self.auto_class
        model, report = auto_class.from_pretrained(
            folder or self.folder, trust_remote_code=True, output_loading_info=True, **options
        )
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert type(model).__module__.startswith("transformers_modules.")
        return model.eval()


@pytest.fixture
def saved(request):
    """The saved model of that name, where this version has its encoder."""
    encoder = request.param.split(".")[0]
    if encoder not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {encoder}")
    return Saved(request.param)


every_model = pytest.mark.parametrize("saved", MODELS, indirect=True)
every_encoder = pytest.mark.parametrize("saved", PLAIN, indirect=True)
every_head_and_encoder = pytest.mark.parametrize("saved", DEFAULTS, indirect=True)


@pytest.fixture
def altered(tmp_path):
    """Copies a saved BERT with other values in its config.json; None takes a field out."""

    def alter(**fields):
        folder = tmp_path / "altered"
        shutil.copytree(SAVED / "bert.sequence.dlfa", folder)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in {**config, **fields}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return alter


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_neither_package_is_installed():
    assert importlib.util.find_spec("xlfa") is None and importlib.util.find_spec("modeling_xlfa") is None


@every_model
@torch.no_grad()
def test_outputs_are_those_of_the_version_that_saved(saved):
    output = saved.load()(**saved.inputs, output_hidden_states=True)
    for name in ("loss", "ot_loss", "logits", "start_logits", "end_logits"):
        assert (name in output) == (name in saved.outputs)
        if name in saved.outputs:
            assert_same(output[name], saved.outputs[name])
    assert len(output.hidden_states) == 5
    for layer, states in enumerate(output.hidden_states):
        assert_same(states, saved.outputs[f"hidden_states.{layer}"])


@every_model
@torch.no_grad()
def test_automodel_is_the_encoder_with_fusion(saved):
    model = saved.load(AutoModel)
    assert type(model).__name__ == "XLFAModel"
    output = model(**saved.task())
    # Fields are keys too.
    for found in (output.last_hidden_state, output["last_hidden_state"], output[0], output.to_tuple()[0]):
        assert_same(found, saved.outputs["last_hidden_state"])
    assert_same(model(**saved.pairs()).ot_loss, saved.outputs["ot_loss"])


@every_head_and_encoder
def test_the_config_loads_alone(saved):
    config = AutoConfig.from_pretrained(saved.folder, trust_remote_code=True)
    assert type(config).__name__ == "XLFAConfig" and config.text_config.model_type == saved.encoder
    assert (config.ot_epsilon, config.fusion_layer, config.num_labels, config.schema_version) == (0.05, 3, 2, 1)


@every_head_and_encoder
@torch.no_grad()
def test_epsilon_can_be_overridden_at_loading(saved):
    model = saved.load(ot_epsilon=0.1)
    assert model.config.ot_epsilon == 0.1
    assert_same(model(**saved.pairs()).ot_loss, saved.outputs["ot_loss_at_0.1"])


@every_head_and_encoder
@torch.no_grad()
def test_a_layer_is_aligned_without_those_above_it(saved):
    model = saved.load(ot_layer=2, ot_epsilon=0.1)
    assert_same(model(**saved.pairs()).ot_loss, saved.outputs["ot_loss_of_layer_2"])


@every_head_and_encoder
def test_frozen_layers_are_not_trained(saved):
    model = saved.load(freeze_layers=3).train()
    model(**saved.inputs).loss.backward()
    layers = {
        name.split("layer.")[1][0] if "layer." in name else name.split("layers.")[1][0]
        for name, weight in model.xlfa.encoder.named_parameters()
        if weight.grad is not None
    }
    assert layers == {"3"}


@every_head_and_encoder
def test_a_checkpointed_part_of_the_encoder_is_trained_or_refused(saved):
    """Older versions compute a layer again without the hook that takes its states: there it is one error."""
    model = saved.load(ot_layer=2).train()
    model.gradient_checkpointing_enable()
    if "__call__" in vars(GradientCheckpointingLayer):
        with pytest.raises(ValueError, match="gradient checkpointing .* newer transformers"):
            model(**saved.pairs())
        return
    model(**saved.pairs()).loss.backward()
    trained = [name for name, weight in model.xlfa.encoder.named_parameters() if weight.grad is not None]
    assert any(".0." in name for name in trained) and not any(".2." in name for name in trained)


@every_head_and_encoder
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@torch.no_grad()
def test_bfloat16_weights_keep_the_loss_in_float32(saved, option):
    model = saved.load(**{option: torch.bfloat16})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    output = model(**saved.inputs)
    assert output.loss.dtype == output.ot_loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, saved.outputs["loss"], rtol=0.05, atol=0.05)


@every_model
def test_a_training_step_moves_every_weight_and_lowers_the_loss(saved):
    model = saved.load()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(**saved.inputs).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    optimizer.step()
    assert model(**saved.inputs).loss < loss


@every_head_and_encoder
@torch.no_grad()
def test_what_is_saved_again_loads_again(saved, tmp_path):
    folder = tmp_path / "again"
    saved.load().save_pretrained(folder)
    assert CODE.issubset(path.name for path in folder.iterdir())
    before, after = (json.loads((path / "config.json").read_text()) for path in (saved.folder, folder))
    assert after["auto_map"] == before["auto_map"] and after["ot_epsilon"] == 0.05
    for auto_class in (saved.auto_class, AutoModel):
        assert_same(saved.load(auto_class, folder)(**saved.pairs()).ot_loss, saved.outputs["ot_loss"])


@every_head_and_encoder
@torch.no_grad()
def test_the_encoder_takes_a_list_of_layers(saved):
    """XLFAModel asks for the fused layers alone; a version that knows no selection gives all."""
    encoder = saved.load(AutoModel).encoder
    states = encoder(**saved.task(), output_hidden_states=[3], return_dict=True).hidden_states
    assert_same(states[3], saved.outputs["hidden_states.3"])


@every_encoder
@torch.no_grad()
def test_a_model_is_built_on_a_pretrained_encoder(saved, tmp_path):
    model = saved.load(AutoModel)
    model.encoder.save_pretrained(tmp_path)
    built = type(model).from_encoder(tmp_path, fusion="none").eval()
    assert_same(built(**saved.task()).last_hidden_state, saved.outputs["last_hidden_state"])


@torch.no_grad()
def test_a_repository_loads_by_its_name(tmp_path):
    """From a cache as the Hub's client fills it: its code is copied by other rules than that of a local folder."""
    saved, commit = Saved("bert.qa.dlfa"), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--bert-xlfa"
    shutil.copytree(saved.folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = saved.load(folder="someone/bert-xlfa", cache_dir=tmp_path)
    assert f".{commit}." in type(model).__module__
    assert_same(model(**saved.inputs).loss, saved.outputs["loss"])


def test_a_config_without_schema_version_loads(altered):
    assert AutoConfig.from_pretrained(altered(schema_version=None), trust_remote_code=True).schema_version == 1


def test_a_newer_schema_version_says_what_to_do(altered):
    folder = altered(schema_version=99, fusion="of tomorrow", ot_of_tomorrow=1)
    with pytest.raises(ValueError, match="schema_version=99 .* a newer checkpoint needs a newer version of xlfa"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_an_encoder_that_this_version_lacks_says_what_to_do(altered):
    folder = altered(text_config={"model_type": "bert-of-tomorrow", "hidden_size": 32})
    with pytest.raises(ValueError, match="has no encoder 'bert-of-tomorrow'.*pip install --upgrade transformers"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
