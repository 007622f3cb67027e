"""Tokenizers that the newest transformers saved, made portable, load in this version and cut text the same way."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

SAVED = Path(__file__).resolve().parents[2] / ".compat" / "saved" / "tokenizers"


# Without trust 5.0 wants to read the config first, cannot, and must do without.
@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("name", sorted(path.name for path in SAVED.iterdir() if path.is_dir()))
def test_texts_are_encoded_as_by_the_version_that_saved(name, trust):
    expected = json.loads((SAVED / f"{name}.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(SAVED / name, trust_remote_code=trust)
    texts, options = expected["texts"], {"padding": True, **expected["options"]}
    assert as_lists(tokenizer(texts, **options)) == expected["single"]
    assert as_lists(tokenizer(texts, texts[::-1], **options)) == expected["pairs"]
    assert sorted(tokenizer.all_special_tokens) == expected["special_tokens"]
    assert tokenizer.model_max_length == expected["model_max_length"]


def as_lists(encoding):
    """As it comes back from JSON: offsets are lists there, not tuples."""
    return json.loads(json.dumps(dict(encoding)))
