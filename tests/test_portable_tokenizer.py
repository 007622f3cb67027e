"""What version 5 alone reads is rewritten, and the tokenizer stays the same. `make test-compat` loads it elsewhere."""

import json

import pytest
from transformers import AutoTokenizer, BertTokenizer

from xlfa.portable_tokenizer import save_portable_tokenizer


def saved_options(folder):
    return json.loads((folder / "tokenizer_config.json").read_text("utf-8"))


@pytest.fixture
def generic(tiny_encoder):
    """A tokenizer without a class of its own, with special tokens beyond the named ones."""
    return AutoTokenizer.from_pretrained(tiny_encoder, additional_special_tokens=["<left>", "<right>"])


def test_names_that_only_version_5_knows_are_replaced(generic, tmp_path):
    generic.save_pretrained(tmp_path)
    before = saved_options(tmp_path)
    assert before["tokenizer_class"] == "TokenizersBackend" and isinstance(before["extra_special_tokens"], list)
    save_portable_tokenizer(generic, tmp_path)
    after = saved_options(tmp_path)
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in after
    assert after["additional_special_tokens"] == ["<left>", "<right>"]
    assert "is_local" not in after and "local_files_only" not in after


def test_the_tokenizer_stays_the_same_however_often_it_is_saved(generic, tmp_path):
    save_portable_tokenizer(generic, tmp_path / "once")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "once")
    texts = ["where is <left> it?", "a café, 42"]
    assert dict(loaded(texts)) == dict(generic(texts))
    assert loaded.all_special_tokens == generic.all_special_tokens
    assert loaded.model_max_length == generic.model_max_length == 512
    save_portable_tokenizer(loaded, tmp_path / "twice")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_a_bert_tokenizer_keeps_its_class_and_says_that_it_returns_segments(tmp_path):
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    save_portable_tokenizer(tokenizer, tmp_path)
    options = saved_options(tmp_path)
    assert options["tokenizer_class"] == "BertTokenizer"
    assert options["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
