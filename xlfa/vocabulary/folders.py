"""An encoder's tokenizer, opened to change its vocabulary, and the folder that is written afterwards."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from modeling_xlfa import XLFAConfig
from modeling_xlfa.encoder_xlfa import load_encoder
from xlfa.backbones import load_tokenizer, naming_model, resolve_encoder
from xlfa.errors import XLFAError
from xlfa.files import building_folder, write_text
from xlfa.portable_tokenizer import make_portable

NEW_PIECES_FILE = "new_pieces.json"
KINDS = ("Unigram", "WordPiece")
# Other files that hold a vocabulary: tokenizer.json has the whole of it.
OLDER_FILES = ("vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Source:
    """An encoder whose vocabulary is to change.

    Args:
        path: a folder or Hub id that `from_pretrained` takes.
        config: the encoder's.
        tokenizer: its tokenizer.
        state: content of its `tokenizer.json`.
    """

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    state: dict[str, Any]

    @classmethod
    def open(cls, name_or_path: str) -> "Source":
        """Read config and tokenizer of a Hub id, a folder or a `packaged:` name.

        Raises:
            XLFAError: for an XLFA checkpoint, or a tokenizer that is neither a unigram nor a WordPiece model: the
                merges of byte-pair encoding depend on pieces that appear in no text.
            OSError, ValueError: where there is no such encoder, or no tokenizer of it.
        """
        path = resolve_encoder(name_or_path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type == XLFAConfig.model_type:
            raise XLFAError(
                f"--model {name_or_path} is an XLFA checkpoint: change the vocabulary of its encoder, then train"
            )
        tokenizer = load_tokenizer(path)
        state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        kind = type(tokenizer).__name__ if state is None else state["model"]["type"]
        if kind not in KINDS:
            raise XLFAError(
                f"--model {name_or_path}: --trim_vocab and `xlfa vocab` work with {' and '.join(KINDS)} tokenizers; "
                f"this one is {kind}: leave them out"
            )
        return cls(path, config, tokenizer, state)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(self.path).name

    def token_ids(self) -> dict[str, int]:
        """Config fields such as `pad_token_id` that name a token of the tokenizer."""
        return {
            name: value
            for name, value in self.config.to_dict().items()
            if name.endswith("_token_id") and isinstance(value, int) and value < len(self.tokenizer)
        }

    def new_pieces(self) -> dict[str, Any] | None:
        """What `xlfa vocab augment` recorded about the encoder; None where it added nothing."""
        return read_new_pieces(self.path)


def read_new_pieces(path: str) -> dict[str, Any] | None:
    """The content of `new_pieces.json` of a folder or Hub id: `first_id` and `pieces`, whose ids follow each other."""
    found = cached_file(
        path,
        NEW_PIECES_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else json.loads(Path(found).read_text("utf-8"))


def lowest_score(model: dict[str, Any]) -> float:
    """Of a unigram model. An unknown character costs 10 more, so this number decides about text of other pieces."""
    return min(score for _, score in model["vocab"])


def write_folder(
    source: Source,
    state: dict[str, Any],
    rows: Callable[[torch.Tensor], torch.Tensor],
    new_ids: Callable[[int], int],
    new_pieces: dict[str, Any] | None,
    folder: Path,
) -> None:
    """Write the encoder with another vocabulary into `folder`.

    Args:
        state: of the new tokenizer.
        rows: old embeddings, V x E → new ones, V' x E.
        new_ids: old id → new one, of the tokens that `source.token_ids` names and of the padding.
        new_pieces: content of `new_pieces.json`.

    Raises:
        XLFAError: for an encoder whose weights cannot be read.
    """
    _write_tokenizer(source.tokenizer, state, folder)
    with naming_model(source.path):
        encoder = load_encoder(source.path, source.config)
    embeddings = rows(encoder.get_input_embeddings().weight.detach()).clone()
    encoder.resize_token_embeddings(len(embeddings), mean_resizing=False)
    encoder.get_input_embeddings().weight.data.copy_(embeddings)
    for name, value in source.token_ids().items():
        setattr(encoder.config, name, new_ids(value))
    if source.tokenizer.pad_token_id is not None:
        encoder.config.pad_token_id = new_ids(source.tokenizer.pad_token_id)
    encoder.save_pretrained(folder)
    if new_pieces is not None:
        write_text(folder / NEW_PIECES_FILE, json.dumps(new_pieces, indent=1, ensure_ascii=False) + "\n")


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    write_text(folder / "tokenizer.json", json.dumps(state, ensure_ascii=False))
    # Written with the old numbers where an older format keeps them; tokenizer.json has them all.
    path = folder / "tokenizer_config.json"
    options = json.loads(path.read_text("utf-8"))
    options.pop("added_tokens_decoder", None)
    write_text(path, json.dumps(options, ensure_ascii=False))
    make_portable(tokenizer, folder)
    for name in OLDER_FILES:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when all is written.

    Raises:
        XLFAError: where `path` is there already and is not an empty folder, or cannot be written.
    """
    check_new_folder(path)
    try:
        with building_folder(Path(path)) as folder:
            yield folder
    except OSError as error:
        raise XLFAError(f"--output_dir {path}: cannot write it ({error.strerror or error})") from None


def check_new_folder(path: str) -> None:
    """Raise `XLFAError` where `path` is a file, a folder with something in it, or one that something is mounted on."""
    target = Path(path)
    if target.is_mount():
        raise XLFAError(f"--output_dir {path} is a mount point: name a folder within it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise XLFAError(f"--output_dir {path}: there is something already: name a new or an empty folder")
