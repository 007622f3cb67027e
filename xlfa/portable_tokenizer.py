"""Tokenizer files that transformers 4.57, 5.0 and the newest 5.x all read."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from xlfa.files import write_text

# How the machine that saves the tokenizer had loaded it: nothing of the tokenizer's own.
LOADING_OPTIONS = ("is_local", "local_files_only")


def save_portable_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a tokenizer so that every version loads it and returns the same from a text."""
    tokenizer.save_pretrained(folder)
    make_portable(tokenizer, folder)


def make_portable(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Rewrite the settings of a tokenizer that was saved in `folder`, so that every version reads them.

    What `save_pretrained` writes into `tokenizer_config.json` is changed where only its own version reads it:

    - `tokenizer_class` is `TokenizersBackend` in version 5 for a tokenizer without a class of its own. Version 4 does
      not know that name; `PreTrainedTokenizerFast` is the same in all.
    - `extra_special_tokens` is a list in version 5, where version 4 wants a mapping and fails. All read the list under
      its older name, `additional_special_tokens`.
    - `model_input_names` is not written where it is the class's default. 5.0 loads every tokenizer in the folder of a
      custom model as `TokenizersBackend`, which returns no `token_type_ids`, so that a BERT would see one segment;
      version 4's `PreTrainedTokenizerFast` returns them to encoders that take none.
    """
    path = Path(folder) / "tokenizer_config.json"
    options = json.loads(path.read_text("utf-8"))
    if options["tokenizer_class"] == "TokenizersBackend":
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(options.get("extra_special_tokens"), list):
        options["additional_special_tokens"] = options.pop("extra_special_tokens")
    options["model_input_names"] = list(tokenizer.model_input_names)
    for name in LOADING_OPTIONS:
        options.pop(name, None)
    write_text(path, json.dumps(options, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
