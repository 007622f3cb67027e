"""Vocabulary trimming: an encoder and tokenizer that keep only the rows a set of texts needs."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modeling_xlfa.modeling_xlfa import load_encoder
from xlfa.backbones import cache_dir, resolve_encoder
from xlfa.errors import XLFAError
from xlfa.files import building_folder

BATCH = 10_000


def trim_vocabulary(name_or_path: str, texts: Iterable[str]) -> str:
    """An encoder folder in the cache that keeps the pieces of `texts` and the special tokens.

    On text whose pieces are all kept the segmentation, and so every score, is the same; other pieces fall apart into
    smaller ones or become the unknown token.

    Args:
        name_or_path: a Hub id, a folder, or a `packaged:` name.
        texts: all text that the model is to read.

    Raises:
        XLFAError: for a tokenizer that is neither a unigram nor a WordPiece model: the merges of byte-pair encoding
            depend on pieces that appear in no text.
    """
    source = resolve_encoder(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    kept = _with_lowest_piece(tokenizer, used_ids(tokenizer, texts))
    digest = hashlib.sha256(json.dumps([str(name_or_path), kept]).encode()).hexdigest()[:16]
    target = cache_dir() / f"{Path(source).name}-trimmed-{digest}"
    if not target.is_dir():
        with building_folder(target) as folder:
            trimmed = type(tokenizer)(
                tokenizer_object=Tokenizer.from_str(json.dumps(_trimmed_tokenizer(tokenizer, kept))),
                model_max_length=tokenizer.model_max_length,
            )
            trimmed.save_pretrained(folder)
            _write_trimmed_encoder(source, kept, trimmed, folder)
    return str(target)


def used_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Ids of the pieces of `texts` and of the special tokens, sorted, so that special tokens stay where they stand."""
    used = set(tokenizer.all_special_ids)
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            used.update(*tokenizer(batch, add_special_tokens=False)["input_ids"])
            batch = []
    if batch:
        used.update(*tokenizer(batch, add_special_tokens=False)["input_ids"])
    return sorted(used)


def _with_lowest_piece(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """A unigram model's unknown token costs as much as its lowest score tells: the piece that has it stays."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] == "Unigram":
        return sorted({*ids, min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1])})
    if model["type"] == "WordPiece":
        return ids
    raise XLFAError(
        f"--trim_vocab works with unigram and WordPiece tokenizers; this encoder's is {model['type']}: leave it out"
    )


def _trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> dict:
    """The tokenizer's JSON with the kept pieces only, renumbered 0, 1, 2, … in their order."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    new_ids = {old: new for new, old in enumerate(kept)}
    if model["type"] == "Unigram":
        model["unk_id"] = new_ids[model["unk_id"]]
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
    else:
        model["vocab"] = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
    state["added_tokens"] = [
        {**token, "id": new_ids[token["id"]]} for token in state["added_tokens"] if token["id"] in new_ids
    ]
    for token in (state["post_processor"] or {}).get("special_tokens", {}).values():
        token["ids"] = [new_ids[old] for old in token["ids"]]
    return state


def _write_trimmed_encoder(source: str, kept: list[int], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    encoder = load_encoder(source, AutoConfig.from_pretrained(source))
    rows = encoder.get_input_embeddings().weight.detach()[kept].clone()
    encoder.resize_token_embeddings(len(kept), mean_resizing=False)
    encoder.get_input_embeddings().weight.data.copy_(rows)
    encoder.config.pad_token_id = tokenizer.pad_token_id
    encoder.save_pretrained(folder)
