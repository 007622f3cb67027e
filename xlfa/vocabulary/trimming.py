"""Vocabulary trimming: an encoder and tokenizer that keep only the rows a set of texts needs."""

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from xlfa.backbones import cache_dir, writable_cache
from xlfa.errors import XLFAError
from xlfa.files import building_folder
from xlfa.vocabulary.folders import Source, lowest_score, write_folder
from xlfa.vocabulary.pieces import is_byte_piece

BATCH = 10_000
# Raised when what is written to the cache changes, so that an older folder is not taken for the new one.
LAYOUT_VERSION = 2


def trim_vocabulary(name_or_path: str, texts: Iterable[str]) -> str:
    """An encoder folder in the cache that keeps the pieces of `texts` and the special tokens.

    On text whose pieces are all kept the segmentation, and so every score, is the same; other pieces fall apart into
    smaller ones or become the unknown token.

    Args:
        name_or_path: a Hub id, a folder, or a `packaged:` name.
        texts: all text that the model is to read.

    Raises:
        XLFAError: for a tokenizer that is neither a unigram nor a WordPiece model.
    """
    source = Source.open(name_or_path)
    return trimmed_encoder(source, kept_ids(source, texts))


def trimmed_encoder(source: Source, kept: list[int]) -> str:
    """An encoder folder in the cache with the pieces `kept`, which come from `kept_ids`."""
    key = [LAYOUT_VERSION, _weights_identity(source), kept]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    target = cache_dir() / f"{source.name}-trimmed-{digest}"
    if not target.is_dir():
        writable_cache()
        with building_folder(target, exist_ok=True) as folder:
            write_trimmed(source, kept, folder)
    return str(target)


def _weights_identity(source: Source) -> list[str]:
    """What tells one state of an encoder from another: its Hub commit, or its files' sizes and times."""
    folder = Path(source.path)
    if folder.is_dir():
        return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(folder.iterdir())]
    return [source.path, str(source.config._commit_hash)]


def kept_ids(source: Source, texts: Iterable[str]) -> list[int]:
    """Ids of the pieces of `texts` and of all that the tokenizer cannot do without, sorted.

    So special tokens stay in their order, and a unigram model's unknown token at its id: some classes of transformers
    (RemBERT's) have that number fixed. It costs as much as the lowest score tells: a piece that has it stays; and so do
    the pieces that spell unknown characters as bytes, where there are any.
    """
    kept = {*used_ids(source.tokenizer, texts), *source.token_ids().values()}
    model = source.state["model"]
    if model["type"] == "Unigram":
        kept.update(range(model["unk_id"] + 1))
        lowest = lowest_score(model)
        kept.add(next(index for index, (_, score) in enumerate(model["vocab"]) if score == lowest))
        if model.get("byte_fallback"):
            kept.update(index for index, (piece, _) in enumerate(model["vocab"]) if is_byte_piece(piece))
    return sorted(kept)


def used_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Ids of the pieces of `texts` and of the special tokens, sorted."""
    used = set(tokenizer.all_special_ids)
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        used.update(*tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
    return sorted(used)


def write_trimmed(source: Source, kept: list[int], folder: Path) -> None:
    """Write the encoder with the pieces that are kept, renumbered 0, 1, 2, … in their order."""
    new_ids = {old: new for new, old in enumerate(kept)}
    state = _trimmed_state(source.state, new_ids)
    write_folder(source, state, lambda weight: weight[kept], new_ids.__getitem__, _kept_record(source, new_ids), folder)


def _kept_record(source: Source, new_ids: dict[int, int]) -> dict[str, Any] | None:
    """Where the pieces stand now that an augmented encoder had got: sorted, they still follow each other."""
    record = source.new_pieces()
    if record is None:
        return None
    added = {record["first_id"] + position: piece for position, piece in enumerate(record["pieces"])}
    kept = [old for old in added if old in new_ids]
    return {**record, "first_id": new_ids[kept[0]], "pieces": [added[old] for old in kept]} if kept else None


def _trimmed_state(state: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """The content of `tokenizer.json` with the pieces of `new_ids` (old → new) only."""
    model = dict(state["model"])
    if model["type"] == "Unigram":
        model["unk_id"] = new_ids[model["unk_id"]]
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new_ids]
    else:
        model["vocab"] = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
    added = [{**token, "id": new_ids[token["id"]]} for token in state["added_tokens"] if token["id"] in new_ids]
    processor = state["post_processor"]
    if processor is not None:
        processor = _renumbered(processor, new_ids)
    return {**state, "model": model, "added_tokens": added, "post_processor": processor}


def _renumbered(processor: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """A post-processor with the new ids of its special tokens.

    Raises:
        XLFAError: for a kind of processor that is not known to hold none.
    """
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_renumbered(part, new_ids) for part in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        sides = {side: [processor[side][0], new_ids[processor[side][1]]] for side in ("sep", "cls")}
        return {**processor, **sides}
    raise XLFAError(f"a vocabulary cannot be trimmed with the tokenizer's post-processor {processor['type']}")
