"""XLFAConfig: every field is checked, and what is saved loads again and carries no local path."""

import json

import pytest
from transformers import AutoConfig

from modeling_xlfa import XLFAConfig


def test_default_fusion_layer_is_two_thirds_of_the_depth():
    assert XLFAConfig().fusion_layer == 8


def test_default_fusion_layer_of_a_two_layer_encoder_is_valid(bert_config):
    bert_config.num_hidden_layers = 2
    assert XLFAConfig(text_config=bert_config).fusion_layer == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fusion", "sum"),
        ("fusion_layer", 0),
        ("fusion_layer", 4),
        ("fusion_layer", 2.0),
        ("fusion_layer", True),
        ("fusion_layer", "last"),
        ("fusion_gate", "tanh"),
        ("fusion_gate_bias", None),
        ("fusion_gate_bias", float("nan")),
        ("fusion_reduction", 0),
        ("fusion_reduction", 33),
        ("fusion_norm", "group"),
        ("fusion_layer_norm", "yes"),
        ("ot_weight", -0.1),
        ("ot_weight", float("nan")),
        ("ot_epsilon", 0.0),
        ("ot_epsilon", -1),
        ("ot_epsilon", float("inf")),
        ("ot_epsilon", "0.1"),
        ("ot_solver", "emd"),
        ("ot_epsilon_scale", "median"),
        ("ot_cost", "euclidean"),
        ("ot_layer", "last"),
        ("ot_layer", 5),
        ("ot_layer", -1),
        ("ot_tau", 0.0),
        ("ot_debiased", 1),
        ("ot_marginals", "tfidf"),
        ("ot_center", "no"),
        ("ot_epsilon_start", -1.0),
        ("ot_max_iter", 0),
        ("ot_tol", 0.0),
        ("classifier_dropout", 1.0),
        ("classifier_pooling", "max"),
        ("schema_version", 2),
    ],
)
def test_a_bad_value_names_field_value_and_what_is_allowed(bert_config, field, value):
    with pytest.raises(ValueError) as error:
        XLFAConfig(text_config=bert_config, **{field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert "must be" in str(error.value)


@pytest.mark.parametrize("fusion", ["none", "scalar_mix"])
def test_what_fuses_no_lower_layer_does_not_look_at_its_index(bert_config, fusion):
    bert_config.num_hidden_layers = 1
    assert XLFAConfig(text_config=bert_config, fusion=fusion).fusion == fusion


@pytest.mark.parametrize("fusion", ["dlfa", "aff"])
def test_one_layer_has_no_lower_one_to_fuse(bert_config, fusion):
    bert_config.num_hidden_layers = 1
    for layer in (None, 1, "learned"):
        with pytest.raises(ValueError, match=f"fusion='{fusion}' .* 'none' or 'scalar_mix'"):
            XLFAConfig(text_config=bert_config, fusion=fusion, fusion_layer=layer)


@pytest.mark.parametrize("field", ["ot_tau", "ot_epsilon_start"])
@pytest.mark.parametrize("solver", ["exact", "product"])
def test_limits_of_epsilon_have_neither_a_schedule_nor_soft_marginals(bert_config, field, solver):
    with pytest.raises(ValueError, match=f"{field}=0.5 is not allowed: it must be None with ot_solver='{solver}'"):
        XLFAConfig(text_config=bert_config, ot_solver=solver, **{field: 0.5})


@pytest.mark.parametrize("fusion", ["dlfa", "aff"])
def test_a_learned_lower_layer_is_saved_and_loaded(bert_config, tmp_path, fusion):
    XLFAConfig(text_config=bert_config, fusion=fusion, fusion_layer="learned").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).fusion_layer == "learned"


@pytest.mark.parametrize("fusion", ["none", "scalar_mix"])
def test_a_learned_lower_layer_needs_a_fusion_that_has_one(bert_config, fusion):
    with pytest.raises(ValueError, match=f"fusion_layer='learned' .* a layer index with fusion='{fusion}'"):
        XLFAConfig(text_config=bert_config, fusion=fusion, fusion_layer="learned")


@pytest.mark.parametrize("model_type", ["t5", "gpt2", "llama"])
def test_a_decoder_is_refused(model_type):
    with pytest.raises(ValueError, match="not an encoder-only model"):
        XLFAConfig(text_config=AutoConfig.for_model(model_type))


def test_a_misspelt_field_and_a_nameless_encoder_are_refused(bert_config):
    with pytest.raises(ValueError, match="unknown field 'ot_epsilom'"):
        XLFAConfig(text_config=bert_config, ot_epsilom=0.2)
    with pytest.raises(ValueError, match="no 'model_type'"):
        XLFAConfig(text_config={"hidden_size": 32})


def test_the_config_that_is_given_stays_as_it_is(bert_config):
    bert_config._name_or_path = "somewhere"
    XLFAConfig(text_config=bert_config)
    assert bert_config._name_or_path == "somewhere"


def test_saved_config_holds_epsilon_and_the_whole_auto_map_and_no_path(bert_config, tmp_path):
    bert_config._name_or_path = "/home/somebody/secret"
    XLFAConfig(text_config=bert_config, ot_epsilon=0.05, auto_map={"AutoModel": "other--code.Model"}).save_pretrained(
        tmp_path
    )
    text = (tmp_path / "config.json").read_text()
    saved = json.loads(text)
    assert saved["ot_epsilon"] == 0.05 and saved["ot_epsilon_scale"] == "centered_std"
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    assert "other--code" not in text and "secret" not in text


def test_loading_gives_the_same_fields_and_takes_overrides(bert_config, tmp_path):
    XLFAConfig(text_config=bert_config, fusion_layer=2, ot_layer=3, num_labels=5).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, ot_epsilon=0.7)
    assert isinstance(loaded, XLFAConfig)
    assert (loaded.fusion_layer, loaded.ot_layer, loaded.num_labels, loaded.ot_epsilon) == (2, 3, 5, 0.7)
    assert loaded.text_config.to_dict() == bert_config.to_dict() | {
        "_name_or_path": "",
        "dtype": loaded.text_config.dtype,
    }
