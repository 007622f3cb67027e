"""New pieces: chosen by what a text gains, they change that text and leave other text and all old ids alone."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertTokenizer
from vocabulary_encoders import KEPT, OTHER, last_states, pieces, save_encoder, unigram_tokenizer, wordpiece_backend

from xlfa.data import load_rows
from xlfa.errors import XLFAError
from xlfa.vocabulary.augmentation import choose_pieces, count_words, piece_model, select_pieces, write_augmented
from xlfa.vocabulary.folders import Source
from xlfa.vocabulary.pieces import is_of_one_kind
from xlfa.vocabulary.trimming import trim_vocabulary

# Of the letters that the tokenizers know, in words that they do not.
TEXT = [
    "Hundemattenhund und Katermatte, Katermatten",
    "Hundematten, Katermatten!",
    "die Katermatte? Hundemattenhund, Hundemattenhunde.",
    "Hundematten! Hundematten saßen, saßen.",
]
NEW_LETTERS = ["γάτα και σκύλος.", "η γάτα, γάτα.", "ο σκύλος! σκύλος? και η γάτα"]
SENTENCES = KEPT + OTHER


@pytest.fixture(params=["unigram", "wordpiece"])
def encoder(request, tmp_path):
    if request.param == "unigram":
        return save_encoder(tmp_path / "unigram", unigram_tokenizer())
    return save_encoder(
        tmp_path / "wordpiece", BertTokenizer(tokenizer_object=wordpiece_backend(), do_lower_case=False)
    )


def augment(folder, texts, number, target, initialisation="mean", seed=0):
    source = Source.open(str(folder))
    model = piece_model(source)
    augmentation = choose_pieces(model, lambda _: iter(texts), number)
    target.mkdir()
    write_augmented(source, model, augmentation, initialisation, seed, target)
    return augmentation


def test_the_text_has_fewer_pieces_and_the_record_says_how_many(encoder, tmp_path):
    found = augment(encoder, TEXT, 4, tmp_path / "new")
    old, new = (pieces(folder, TEXT) for folder in (encoder, tmp_path / "new"))
    # <s> and </s>, [CLS] and [SEP].
    counts = [sum(len(row) - 2 for row in rows) for rows in (old, new)]
    assert counts == [found.before.pieces, found.after.pieces] and counts[1] < counts[0]
    record = json.loads((tmp_path / "new" / "new_pieces.json").read_text())
    assert record["pieces"] == found.pieces and record["text"]["after"]["pieces"] == counts[1]
    assert {piece for row in new for piece in row} >= set(found.pieces)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    first = record["first_id"]
    assert tokenizer.convert_tokens_to_ids(found.pieces) == list(range(first, first + 4))


def test_other_text_and_old_ids_stay(encoder, tmp_path):
    augment(encoder, TEXT, 4, tmp_path / "new")
    old, new = AutoTokenizer.from_pretrained(encoder), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert new(SENTENCES)["input_ids"] == old(SENTENCES)["input_ids"]
    vocabulary = new.get_vocab()
    assert old.get_vocab().items() <= vocabulary.items() and len(new) == len(old) + 4
    assert (new.special_tokens_map, new.all_special_ids) == (old.special_tokens_map, old.all_special_ids)
    assert new(f"a {old.mask_token} b")["input_ids"] == old(f"a {old.mask_token} b")["input_ids"]
    torch.testing.assert_close(last_states(tmp_path / "new", SENTENCES), last_states(encoder, SENTENCES))
    configs = [AutoModel.from_pretrained(folder).config for folder in (encoder, tmp_path / "new")]
    assert configs[0].pad_token_id == configs[1].pad_token_id == new.pad_token_id
    assert configs[1].vocab_size == configs[0].vocab_size + 4


def test_unknown_characters_get_pieces(encoder, tmp_path):
    texts = ["☃ ☃☃", "☃", "☃ 雪"]
    found = augment(encoder, texts, 3, tmp_path / "new")
    assert found.before.unknown > 0 == found.after.unknown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert all(tokenizer.unk_token_id not in row for row in tokenizer(texts)["input_ids"])


def test_new_embeddings_are_the_means_of_the_old_pieces(encoder, tmp_path):
    found = augment(encoder, TEXT, 3, tmp_path / "new")
    old = AutoModel.from_pretrained(encoder).get_input_embeddings().weight
    new = AutoModel.from_pretrained(tmp_path / "new").get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for row, piece in zip(new[len(old) :], found.pieces):
        if piece.startswith(("▁", "H", "K", "d", "s", "u")):
            ids = tokenizer(piece.removeprefix("▁"), add_special_tokens=False)["input_ids"]
            assert len(ids) > 1
            torch.testing.assert_close(row, old[ids].mean(0))


def test_pieces_inside_words_stand_for_pieces_inside_words(tmp_path):
    folder = save_encoder(tmp_path / "wordpiece", BertTokenizer(tokenizer_object=wordpiece_backend()))
    model = piece_model(Source.open(folder))
    assert model.old_parts(["##at"])[0] != model.old_parts(["at"])[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for part in model.old_parts(["##saat"])[0]:
        assert tokenizer.convert_ids_to_tokens(part).startswith("##")


def test_random_embeddings_depend_on_the_seed_alone(encoder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        augment(encoder, TEXT, 3, tmp_path / name, "random", seed)
    rows = [AutoModel.from_pretrained(tmp_path / name).get_input_embeddings().weight[-3:] for name in "abc"]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_the_same_text_gives_the_same_bytes(encoder, tmp_path):
    for name in ("a", "b"):
        augment(encoder, TEXT + NEW_LETTERS, 6, tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files.keys() >= {"model.safetensors", "tokenizer.json", "config.json", "new_pieces.json"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_spare_rows_of_the_embeddings_are_used_first(tmp_path):
    tokenizer = unigram_tokenizer()
    folder = save_encoder(tmp_path / "spare", tokenizer)
    model = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer) + 10, mean_resizing=False)
    model.save_pretrained(folder)
    augment(folder, TEXT, 4, tmp_path / "new")
    weight = AutoModel.from_pretrained(tmp_path / "new").get_input_embeddings().weight
    assert len(weight) == len(tokenizer) + 10
    old = model.get_input_embeddings().weight
    assert torch.equal(weight[len(tokenizer) + 4 :], old[len(tokenizer) + 4 :])
    assert not torch.isclose(
        weight[len(tokenizer) : len(tokenizer) + 4], old[len(tokenizer) : len(tokenizer) + 4]
    ).all()


def test_a_merge_scores_more_than_its_parts_and_never_below_the_lowest(tmp_path):
    model = piece_model(Source.open(save_encoder(tmp_path / "unigram", unigram_tokenizer())))
    new = [piece for piece in ("att", "Kat", "Katermatte", "☃") if piece not in model.old_pieces]
    assert len(new) >= 3
    scores = dict(tuple(piece) for piece in model.extended(new)["vocab"])
    lowest = min(score for _, score in model.model["vocab"])
    for piece, parts in zip(new, model.old_parts(new)):
        together = sum(model.scores[part] for part in parts)
        if piece == "☃" or together < lowest:
            assert scores[piece] == lowest
        else:
            assert together < scores[piece] < together + 0.01
    # Of new pieces that score alike, that which takes the place of more old ones wins.
    last = model.first_id + new.index("Katermatte")
    assert [found.ids[-1] for found in model.segment(["▁Katermatte"], new)] == [last]
    assert min(scores.values()) == lowest


def test_text_splits_elsewhere_keep_their_boundaries(tmp_path):
    """A unigram model's new segmentation is the old one with pieces merged."""
    model = piece_model(Source.open(save_encoder(tmp_path / "unigram", unigram_tokenizer())))
    words = list(count_words(model, SENTENCES + TEXT))
    candidates = sorted({"▁Hun", "ema", "att", "und", "ter"} - set(model.old_pieces))
    merged = 0
    for old, new in zip(model.segment(words), model.segment(words, candidates)):
        expected = []
        for token_id in new.ids:
            is_new = token_id >= model.first_id
            expected += model.old_parts([candidates[token_id - model.first_id]])[0] if is_new else [token_id]
            merged += is_new
        assert expected == old.ids
    assert merged > 0


def test_pieces_that_the_text_gains_most_from_come_first(encoder):
    model = piece_model(Source.open(encoder))
    words = Counter(
        {word: count for text, count in (("Katermatte", 9), ("Hundematten", 2)) for word in model.words(text)}
    )
    candidates = list(words)
    costs = [found.cost for found in model.segment(words)]
    assert select_pieces(model, candidates, words, costs, 1) == [candidates[0]]
    assert select_pieces(model, candidates, words, costs, 2) == candidates
    useless = "▁zzz" if candidates[0].startswith("▁") else "zzz"
    assert select_pieces(model, [*candidates, useless], words, costs, 3) == candidates


def test_more_pieces_than_the_text_has_are_refused(encoder):
    with pytest.raises(XLFAError, match=r"--pieces 500: the text has only \d+ new pieces"):
        choose_pieces(piece_model(Source.open(encoder)), lambda _: iter(TEXT), 500)


def test_more_is_trained_where_a_small_vocabulary_gives_too_few(encoder, monkeypatch):
    monkeypatch.setattr("xlfa.vocabulary.augmentation.TRAINED_SIZE", 1)
    monkeypatch.setattr("xlfa.vocabulary.augmentation.TRAINED_FOR_ONE_ADDED", 0)
    assert len(choose_pieces(piece_model(Source.open(encoder)), lambda _: iter(TEXT), 4).pieces) == 4


def test_a_second_augmentation_goes_on_behind_the_first(encoder, tmp_path):
    first = augment(encoder, TEXT, 3, tmp_path / "one")
    second = augment(tmp_path / "one", NEW_LETTERS, 2, tmp_path / "two")
    record = json.loads((tmp_path / "two" / "new_pieces.json").read_text())
    assert record["pieces"] == first.pieces + second.pieces
    assert record["first_id"] == len(AutoTokenizer.from_pretrained(encoder))


def test_trimming_an_augmented_encoder_renumbers_its_record(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XLFA_CACHE", str(tmp_path / "cache"))
    found = augment(encoder, TEXT, 4, tmp_path / "new")
    trimmed = trim_vocabulary(str(tmp_path / "new"), TEXT[:1])
    record = json.loads((Path(trimmed) / "new_pieces.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    ids = tokenizer.convert_tokens_to_ids(record["pieces"])
    assert ids == list(range(record["first_id"], len(tokenizer))) and 0 < len(ids) < 4
    rows = {
        name: load_file(Path(folder) / "model.safetensors")["embeddings.word_embeddings.weight"]
        for name, folder in (("trimmed", trimmed), ("whole", tmp_path / "new"))
    }
    whole_ids = AutoTokenizer.from_pretrained(tmp_path / "new").convert_tokens_to_ids(record["pieces"])
    assert torch.equal(rows["trimmed"][ids], rows["whole"][whole_ids])
    assert set(record["pieces"]) <= set(found.pieces)
    assert not (Path(trim_vocabulary(str(tmp_path / "new"), SENTENCES)) / "new_pieces.json").exists()


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("▁γάτα", True), ("γάτα", True), ("▁γάτα.", False), ("...", True), ("▁", False), ("a▁b", False)],
)
def test_unigram_pieces_are_letters_or_not(piece, expected):
    assert is_of_one_kind(piece) == expected


@pytest.mark.offline
def test_greek_pieces_of_the_packaged_encoder_leave_other_languages_alone():
    model = piece_model(Source.open("packaged:multilingual-e5-small"))
    codes = ("en", "bg", "zh", "th")
    texts = {code: load_rows("facebook/xnli", code, "test", "sample")["premise"][:12] for code in codes}
    greek = [row["el"] for row in load_rows("local/parallel", "en-el", "train", "sample")["translation"]]
    found = choose_pieces(model, lambda _: iter(greek), 5)
    assert found.after.pieces < found.before.pieces
    words = [word for sentences in texts.values() for word in count_words(model, sentences)]
    for old, new in zip(model.segment(words), model.segment(words, found.pieces), strict=True):
        assert old == new
    vocabulary = model.extended(found.pieces)["vocab"]
    assert vocabulary[250001] == ["<mask>", 0.0] and [piece for piece, _ in vocabulary[250002:]] == found.pieces
