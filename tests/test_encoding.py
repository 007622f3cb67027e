"""Rows are tokenised once for each tokenizer and limit, and what changes the result changes the key."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoTokenizer

from modeling_xlfa import XLFAConfig, XLFAModel
from xlfa.encoding import check_length, encode_rows, longest_input, task_digest, tokenizer_digest
from xlfa.errors import XLFAError
from xlfa.tasks import get_task
from xlfa.tasks.sequence_classification import SequenceClassificationTask

pytestmark = pytest.mark.usefixtures("own_cache")
TASK = get_task("xnli")


@pytest.fixture
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def encoded(monkeypatch):
    """The limits that rows were tokenised with; what the cache holds is not among them."""
    limits = []
    encode = SequenceClassificationTask.encode

    def recording_encode(self, batch, positions, tokenizer, max_length, doc_stride):
        limits.append(max_length)
        return encode(self, batch, positions, tokenizer, max_length, doc_stride)

    monkeypatch.setattr(SequenceClassificationTask, "encode", recording_encode)
    return limits


def test_rows_are_tokenised_once_for_each_limit(tokenizer, encoded):
    first = encode_rows(TASK, TASK.load_test("de", "sample"), tokenizer, 64, 0)
    again = encode_rows(TASK, TASK.load_test("de", "sample"), tokenizer, 64, 0)
    assert encoded == [64] and first.to_dict() == again.to_dict()
    encode_rows(TASK, TASK.load_test("de", "sample"), tokenizer, 32, 0)
    encode_rows(TASK, TASK.load_test("de", "sample").select(range(5)), tokenizer, 32, 0)
    encode_rows(TASK, TASK.load_test("en", "sample"), tokenizer, 32, 0)
    assert encoded == [64, 32, 32, 32]


def test_the_key_of_a_tokenizer_does_not_change_with_its_calls(tiny_encoder, tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    tokenizer_digest.cache_clear()
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(AutoTokenizer.from_pretrained(tiny_encoder))


@pytest.mark.parametrize(
    ("encoder_config", "limit"),
    [("bert", 512), ("xlm-roberta", 510), ("distilbert", 512), ("modernbert", math.inf), ("eurobert", math.inf)],
    indirect=["encoder_config"],
)
def test_the_longest_input_is_what_positions_were_learned_for(encoder_config, limit):
    model = XLFAModel(XLFAConfig(text_config=encoder_config, fusion="none"))
    assert longest_input(model) == limit
    check_length("max_length", 510, model)
    if limit < math.inf:
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises(XLFAError, match=f"--max_length {limit + 1}: the encoder has positions for {limit} tokens"):
            check_length("max_length", limit + 1, model)


def test_another_vocabulary_is_another_tokenizer(tiny_encoder, tokenizer):
    other = AutoTokenizer.from_pretrained(tiny_encoder)
    other.add_tokens(["word"])
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_a_tokenizer_in_python_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    tokenizer_digest.cache_clear()
    with pytest.raises(XLFAError, match="is one in Python; XLFA needs a fast"):
        TASK.windows(TASK.load_test("de", "sample"), tokenizer, 64, 0)


def test_tasks_of_one_class_differ_by_their_fields():
    assert task_digest(TASK) == task_digest(dataclasses.replace(TASK)) != task_digest(get_task("pawsx"))


def test_what_the_limit_cuts_is_reported_from_the_cache_too(tokenizer, caplog):
    for _ in range(2):
        caplog.clear()
        TASK.windows(TASK.load_test("de", "sample"), tokenizer, 24, 0)
        assert "xnli, limit of 24 tokens: 45 pairs reach it and may be cut" in caplog.text
