"""`xlfa vocab`: folders that training takes, and one clear error for each kind of bad input."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabulary_encoders import BERT_TOKENS, KEPT, OTHER, last_states, pieces, save_encoder, unigram_tokenizer

from modeling_xlfa import XLFAForSequenceClassification
from xlfa.errors import XLFAError
from xlfa.vocabulary.commands import main
from xlfa.vocabulary.texts import read_sentences

NEW = ["Katermatte, Hundematte!", "Hundematte und Katermatte."]


@pytest.fixture
def encoder(tmp_path):
    return save_encoder(tmp_path / "encoder", unigram_tokenizer())


@pytest.fixture
def text(tmp_path):
    """A function that writes lines into a file of a name."""

    def write(name, lines, separator="\n"):
        path = tmp_path / name
        path.write_bytes(
            b"".join((line.encode() if isinstance(line, str) else line) + separator.encode() for line in lines)
        )
        return str(path)

    return write


def test_trim_keeps_what_all_files_use(encoder, text, tmp_path, capsys):
    files = [text(name, [sentence]) for name, sentence in zip("ab", KEPT)]
    main(["trim", "--model", encoder, "--texts", *files, "--output_dir", str(tmp_path / "new")])
    assert pieces(tmp_path / "new", KEPT) == pieces(encoder, KEPT)
    kept, whole = len(AutoTokenizer.from_pretrained(tmp_path / "new")), len(AutoTokenizer.from_pretrained(encoder))
    assert kept < whole and f"kept {kept} of {whole} pieces" in capsys.readouterr().out


def test_augment_writes_an_encoder_that_a_model_is_built_on(encoder, text, tmp_path, capsys):
    target = tmp_path / "deep" / "new"
    main(["augment", "--model", encoder, "--texts", text("a", NEW), "--pieces", "2", "--output_dir", str(target)])
    output = capsys.readouterr().out
    assert "added 2 pieces" in output and "before: " in output and "after: " in output
    assert "▁Katermatte" in output and "▁Katermatte" in pieces(target, NEW)[0]
    assert XLFAForSequenceClassification.from_encoder(str(target)).get_input_embeddings().num_embeddings == len(
        AutoTokenizer.from_pretrained(target)
    )
    assert last_states(target, NEW).isfinite().all()


def test_lines_are_sentences_whatever_ends_them(text):
    path = text("a", ["\ufeffone", "", "  ", "two \u2028 parts"], "\r\n")
    assert list(read_sentences([path, path], "")) == ["one", "two \u2028 parts"] * 2


def test_bad_files_are_named_with_the_line(encoder, text, tmp_path):
    def error(*files, model=encoder, output="new", pieces="2"):
        with pytest.raises(XLFAError) as caught:
            flags = ["--model", model, "--texts", *files, "--output_dir", str(tmp_path / output)]
            main(["augment", *flags, "--pieces", pieces])
        return str(caught.value)

    good = text("good", NEW)
    bad = text("bad", ["fine", b"a\xff"])
    assert f"--texts {tmp_path}/none: no such file" == error(good, f"{tmp_path}/none")
    assert f"--texts {bad}, line 2: not UTF-8 (byte 2 of the line)" in error(good, bad)
    assert "there is no text in it" in error(text("empty", ["", " "]))
    assert "--pieces 900: the text has only" in error(good, pieces="900")
    assert "--output_dir" in error(good, output="encoder") and "something already" in error(good, output="encoder")
    assert "something already" in error(good, output="good")
    assert "--model /nowhere: no such encoder" in error(good, model="/nowhere")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [["trim"], ["augment", "--pieces", "2"]])
def test_an_xlfa_checkpoint_and_byte_pair_encoding_are_refused(command, encoder, text, tmp_path):
    def error(model):
        with pytest.raises(XLFAError) as caught:
            main([*command, "--model", str(model), "--texts", text("a", NEW), "--output_dir", str(tmp_path / "new")])
        return str(caught.value)

    trained = tmp_path / "trained"
    XLFAForSequenceClassification.from_encoder(encoder).save_pretrained(trained)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(trained)
    assert f"--model {trained} is an XLFA checkpoint" in error(trained)
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(OTHER, trainers.BpeTrainer(vocab_size=60, special_tokens=list(BERT_TOKENS.values())))
    folder = save_encoder(tmp_path / "bpe", PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS))
    assert "this one is BPE" in error(folder)


@pytest.mark.parametrize("weights", [None, b"no safetensors"])
def test_an_encoder_without_whole_weights_is_named(encoder, text, tmp_path, weights):
    folder = Path(encoder)
    (folder / "model.safetensors").unlink()
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(XLFAError, match=f"--model {folder}: "):
        main(["trim", "--model", str(folder), "--texts", text("a", KEPT), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_an_encoder_without_a_tokenizer_is_named(untokenised_encoder, text, tmp_path):
    with pytest.raises(XLFAError, match=f"--model {untokenised_encoder}: it has no tokenizer files"):
        main(
            ["trim", "--model", untokenised_encoder, "--texts", text("a", KEPT), "--output_dir", str(tmp_path / "new")]
        )


def test_an_empty_folder_is_written_into(encoder, text, tmp_path):
    (tmp_path / "new").mkdir()
    main(["trim", "--model", encoder, "--texts", text("a", KEPT), "--output_dir", str(tmp_path / "new")])
    assert (tmp_path / "new" / "model.safetensors").is_file()


@pytest.mark.parametrize("argv", [["--help"], ["augment", "--help"]])
def test_help_fits_a_screen(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert done.value.code == 0 and len(lines) <= 24


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_number_of_pieces_is_positive(number, capsys):
    with pytest.raises(SystemExit):
        main(["augment", "--model", "x", "--texts", "x", "--output_dir", "x", "--pieces", number])
    assert "--pieces" in capsys.readouterr().err
