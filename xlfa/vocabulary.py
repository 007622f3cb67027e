"""Vocabulary trimming: an encoder and tokenizer that keep only the rows a set of texts needs."""

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

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
    digest = hashlib.sha256(json.dumps([_weights_identity(source), kept]).encode()).hexdigest()[:16]
    target = cache_dir() / f"{Path(source).name}-trimmed-{digest}"
    if not target.is_dir():
        with building_folder(target) as folder:
            _write_trimmed_tokenizer(tokenizer, kept, folder)
            _write_trimmed_encoder(source, kept, kept.index(tokenizer.pad_token_id), folder)
    return str(target)


def _weights_identity(source: str) -> list[str]:
    """What tells one state of an encoder from another: its Hub commit, or its files' sizes and times."""
    folder = Path(source)
    if folder.is_dir():
        return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(folder.iterdir())]
    return [source, str(AutoConfig.from_pretrained(source)._commit_hash)]


def used_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Ids of the pieces of `texts` and of the special tokens, sorted, so that special tokens stay where they stand."""
    used = set(tokenizer.all_special_ids)
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
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


def _write_trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int], folder: Path) -> None:
    """The tokenizer's own files, with the pieces that are kept, renumbered 0, 1, 2, … in their order."""
    tokenizer.save_pretrained(folder)
    new_ids = {old: new for new, old in enumerate(kept)}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(_trimmed_state(json.loads(path.read_text("utf-8")), new_ids)), encoding="utf-8")
    # Written with the old numbers where an older format keeps them; tokenizer.json has them all.
    path = folder / "tokenizer_config.json"
    options = json.loads(path.read_text("utf-8"))
    options.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(options, indent=2, ensure_ascii=False), encoding="utf-8")
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        (folder / name).unlink(missing_ok=True)


def _trimmed_state(state: dict, new_ids: dict[int, int]) -> dict:
    """The content of `tokenizer.json` with the pieces of `new_ids` (old → new) only."""
    model = state["model"]
    if model["type"] == "Unigram":
        model["unk_id"] = new_ids[model["unk_id"]]
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new_ids]
    else:
        model["vocab"] = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
    state["added_tokens"] = [
        {**token, "id": new_ids[token["id"]]} for token in state["added_tokens"] if token["id"] in new_ids
    ]
    if state["post_processor"] is not None:
        _renumber(state["post_processor"], new_ids)
    return state


def _renumber(processor: dict, new_ids: dict[int, int]) -> None:
    """Give the special tokens of a post-processor their new ids.

    Raises:
        XLFAError: for a kind of processor that is not known to hold none.
    """
    if processor["type"] == "Sequence":
        for part in processor["processors"]:
            _renumber(part, new_ids)
    elif processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_ids[old] for old in token["ids"]]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for side in ("sep", "cls"):
            token, old = processor[side]
            processor[side] = [token, new_ids[old]]
    else:
        raise XLFAError(f"--trim_vocab does not know the tokenizer's post-processor {processor['type']}: leave it out")


def _write_trimmed_encoder(source: str, kept: list[int], pad_token_id: int, folder: Path) -> None:
    encoder = load_encoder(source, AutoConfig.from_pretrained(source))
    rows = encoder.get_input_embeddings().weight.detach()[kept].clone()
    encoder.resize_token_embeddings(len(kept), mean_resizing=False)
    encoder.get_input_embeddings().weight.data.copy_(rows)
    encoder.config.pad_token_id = pad_token_id
    encoder.save_pretrained(folder)
