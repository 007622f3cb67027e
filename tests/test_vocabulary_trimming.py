"""A trimmed encoder reads the text it was trimmed for exactly as the whole one does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from vocabulary_encoders import (
    BERT_TOKENS,
    KEPT,
    OTHER,
    last_states,
    pieces,
    save_encoder,
    unigram_tokenizer,
    wordpiece_backend,
)

from xlfa.backbones import resolve_encoder
from xlfa.data import load_rows
from xlfa.errors import XLFAError
from xlfa.training import main as train
from xlfa.vocabulary.trimming import trim_vocabulary, used_ids


@pytest.fixture(scope="module")
def packaged_folder():
    """The packaged encoder in the user's cache, which is looked up before `cache` points elsewhere."""
    return resolve_encoder("packaged:multilingual-e5-small")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of its own for each test."""
    monkeypatch.setenv("XLFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unigram(tmp_path):
    return save_encoder(tmp_path / "unigram", unigram_tokenizer())


@pytest.fixture
def wordpiece(tmp_path):
    tokenizer = BertTokenizer(tokenizer_object=wordpiece_backend(), do_lower_case=True)
    return save_encoder(tmp_path / "wordpiece", tokenizer)


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_kept_text_has_the_same_pieces_and_states_in_a_smaller_vocabulary(kind, request):
    folder = request.getfixturevalue(kind)
    trimmed = trim_vocabulary(folder, KEPT)
    assert pieces(trimmed, KEPT) == pieces(folder, KEPT)
    torch.testing.assert_close(last_states(trimmed, KEPT), last_states(folder, KEPT), rtol=0, atol=1e-5)
    model, tokenizer = AutoModel.from_pretrained(trimmed), AutoTokenizer.from_pretrained(trimmed)
    assert model.config.vocab_size == len(tokenizer) < len(AutoTokenizer.from_pretrained(folder))
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.model_max_length == AutoTokenizer.from_pretrained(folder).model_max_length


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_special_tokens_keep_their_roles(kind, request):
    folder = request.getfixturevalue(kind)
    whole, trimmed = (AutoTokenizer.from_pretrained(name) for name in (folder, trim_vocabulary(folder, KEPT)))
    assert trimmed.special_tokens_map == whole.special_tokens_map
    assert len(set(trimmed.all_special_ids)) == len(set(whole.all_special_ids))
    assert max(trimmed.all_special_ids) < len(trimmed)


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_other_text_still_encodes(kind, request):
    folder = trim_vocabulary(request.getfixturevalue(kind), KEPT)
    texts = [*OTHER, "完全に別の文 ☃"]
    ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    assert all(len(row) > 2 for row in ids)
    assert torch.isfinite(last_states(folder, texts)).all()


def test_a_cached_folder_is_reused_and_other_text_gets_another_one(unigram, cache):
    first = trim_vocabulary(unigram, KEPT)
    written = (Path(first) / "config.json").stat().st_mtime_ns
    assert trim_vocabulary(unigram, KEPT[::-1]) == first
    assert (Path(first) / "config.json").stat().st_mtime_ns == written
    assert trim_vocabulary(unigram, KEPT + OTHER) != first
    assert len(list(cache.iterdir())) == 2


def test_used_ids_of_many_texts_are_those_of_all_batches(unigram, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(unigram)
    expected = {id for ids in tokenizer(KEPT + OTHER)["input_ids"] for id in ids} | set(tokenizer.all_special_ids)
    monkeypatch.setattr("xlfa.vocabulary.trimming.BATCH", 3)
    assert used_ids(tokenizer, iter(KEPT + OTHER)) == sorted(expected)


def test_byte_pair_encoding_is_refused(tmp_path):
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(KEPT, trainers.BpeTrainer(vocab_size=60, special_tokens=list(BERT_TOKENS.values())))
    folder = save_encoder(tmp_path / "bpe", PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS))
    with pytest.raises(XLFAError, match="--trim_vocab.*BPE"):
        trim_vocabulary(folder, KEPT)


def test_the_unknown_token_of_a_unigram_model_keeps_its_id(tmp_path):
    """RemBERT's class has the number fixed, whatever the file says."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    backend.train_from_iterator((KEPT + OTHER) * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    trimmed = trim_vocabulary(save_encoder(tmp_path / "unigram", tokenizer), KEPT)
    assert AutoTokenizer.from_pretrained(trimmed).unk_token_id == tokenizer.unk_token_id == 2
    assert len(AutoTokenizer.from_pretrained(trimmed)) < len(tokenizer)


def test_a_cased_wordpiece_tokenizer_stays_cased(tmp_path):
    tokenizer = BertTokenizer(tokenizer_object=wordpiece_backend(), do_lower_case=False)
    folder = save_encoder(tmp_path / "cased", tokenizer)
    assert pieces(trim_vocabulary(folder, KEPT), KEPT) == pieces(folder, KEPT)


def test_a_tokenizer_of_the_generic_class_keeps_its_special_tokens(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece_backend(), **BERT_TOKENS)
    folder = save_encoder(tmp_path / "generic", tokenizer)
    assert AutoTokenizer.from_pretrained(trim_vocabulary(folder, KEPT)).special_tokens_map == BERT_TOKENS


@pytest.mark.parametrize("post_processor", [processors.BertProcessing, processors.RobertaProcessing])
def test_every_post_processor_puts_in_the_new_ids_of_the_special_tokens(tmp_path, post_processor):
    backend = wordpiece_backend()
    sep, cls = ((token, backend.token_to_id(token)) for token in ("[SEP]", "[CLS]"))
    backend.post_processor = post_processor(sep, cls)
    folder = save_encoder(tmp_path / "generic", PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS))
    assert pieces(trim_vocabulary(folder, KEPT), KEPT) == pieces(folder, KEPT)


def test_a_folder_with_other_weights_is_not_mistaken_for_its_predecessor(unigram):
    trim_vocabulary(unigram, KEPT)
    save_encoder(Path(unigram), AutoTokenizer.from_pretrained(unigram), seed=1)
    trimmed = trim_vocabulary(unigram, KEPT)
    torch.testing.assert_close(last_states(trimmed, KEPT), last_states(unigram, KEPT), rtol=0, atol=1e-5)


@pytest.mark.offline
def test_the_packaged_encoder_trimmed_to_the_sample_scores_alike(packaged_folder):
    texts = []
    for language in ("ar", "el", "en", "hi", "th", "zh"):
        texts += load_rows("facebook/xnli", language, "test", "sample")["premise"][:8]
    trimmed = trim_vocabulary(packaged_folder, texts)
    assert pieces(trimmed, texts) == pieces(packaged_folder, texts)
    torch.testing.assert_close(last_states(trimmed, texts), last_states(packaged_folder, texts), rtol=0, atol=1e-5)
    size = json.loads((Path(trimmed) / "config.json").read_text())["vocab_size"]
    assert size < 2000


def test_a_run_is_the_same_whether_its_trimmed_encoder_was_there_or_not(unigram, tmp_path, cache):
    """Building it draws random numbers, which must not reach the head."""
    weights = []
    for name in ("built", "cached"):
        common = ["--model", unigram, "--task", "xnli", "--data_root", "sample", "--output_dir", str(tmp_path / name)]
        small = ["--max_train_examples", "8", "--max_eval_examples", "9", "--max_steps", "1", "--save_strategy", "no"]
        train([*common, *small, "--trim_vocab", "true", "--max_length", "64", "--fusion", "none"])
        weights.append(load_file(tmp_path / name / "model.safetensors")["classifier.weight"])
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(*weights)
