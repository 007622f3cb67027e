"""Saves tiny models and tokenizers, and what they give, with the transformers of the main environment.

    PYTHONPATH=tests python tests/compat/save_models.py FOLDER

Beside each model's folder NAME stands NAME.safetensors with its inputs and outputs, beside a tokenizer's NAME.json with
texts and their encodings.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from conftest import ENCODER_CONFIGS
from safetensors.torch import save_file
from test_modeling import FUSIONS, pair_inputs, randomise, task_inputs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from modeling_xlfa import (
    XLFAConfig,
    XLFAForQuestionAnswering,
    XLFAForSequenceClassification,
    XLFAForTokenClassification,
    XLFAModel,
)
from xlfa.backbones import resolve_encoder
from xlfa.portable_tokenizer import save_portable_tokenizer

HEADS = {"qa": XLFAForQuestionAnswering, "sequence": XLFAForSequenceClassification, "token": XLFAForTokenClassification}
# The heads share one code path through fusion: every encoder meets every head with the default and every fusion once.
MODELS = [(encoder, head, "dlfa") for encoder in ENCODER_CONFIGS for head in HEADS] + [
    (encoder, "token", fusion) for encoder in ENCODER_CONFIGS for fusion in ("none", *FUSIONS) if fusion != "dlfa"
]
TEXTS = [
    "Where did the first one go?",
    "a  b\tc <mask> [MASK] <left> 42, e.",
    "Übergrößenträger naïve CAFÉ",
    "कहाँ गया? 何処へ? เขาไปไหน أين ذهب",
    "",
]


@torch.no_grad()
def save_model(folder: Path, encoder: str, head: str, fusion: str) -> None:
    """A model whose running statistics and mixing weights have left their start, in eval mode."""
    torch.manual_seed(0)
    fields = FUSIONS.get(fusion, {"fusion": fusion})
    config = XLFAConfig(text_config=ENCODER_CONFIGS[encoder](), ot_weight=0.5, ot_epsilon=0.05, num_labels=2, **fields)
    model = HEADS[head](config).train()
    if model.xlfa.fusion is not None:
        randomise(model.xlfa.fusion)
    inputs = {**task_inputs(HEADS[head]), **pair_inputs()}
    model(**inputs)
    model.eval().save_pretrained(folder)

    output = model(**inputs, output_hidden_states=True)
    expected = {
        name: output[name] for name in ("loss", "ot_loss", "logits", "start_logits", "end_logits") if name in output
    }
    expected |= {f"hidden_states.{layer}": states for layer, states in enumerate(output.hidden_states)}
    expected["last_hidden_state"] = model.xlfa(**task_inputs()).last_hidden_state
    model.config.ot_epsilon = 0.1
    expected["ot_loss_at_0.1"] = model(**pair_inputs()).ot_loss
    model.config.ot_layer = 2
    expected["ot_loss_of_layer_2"] = model(**pair_inputs()).ot_loss
    tensors = {f"input/{name}": value for name, value in inputs.items()}
    tensors |= {f"output/{name}": value.contiguous() for name, value in expected.items()}
    save_file(tensors, f"{folder}.safetensors")


def generic_tokenizer() -> PreTrainedTokenizerFast:
    """One without a class of its own, with special tokens beyond the named ones."""
    vocabulary = {token: index for index, token in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdehoirst?,."))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<left>"], model_max_length=512, **named
    )


def bert_tokenizer() -> BertTokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz?,", "where", "##ere", "##one"]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=512)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As a published model has it: in the folder of a model, whose code and `auto_map` stand beside."""
    XLFAModel(XLFAConfig(text_config=ENCODER_CONFIGS["bert"]())).save_pretrained(folder)
    save_portable_tokenizer(tokenizer, folder)
    options = {"truncation": True, "max_length": 24, "return_offsets_mapping": True}
    expected = {
        "texts": TEXTS,
        "options": options,
        "single": dict(tokenizer(TEXTS, padding=True, **options)),
        "pairs": dict(tokenizer(TEXTS, TEXTS[::-1], padding=True, **options)),
        "special_tokens": sorted(tokenizer.all_special_tokens),
        "model_max_length": tokenizer.model_max_length,
    }
    Path(f"{folder}.json").write_text(json.dumps(expected), encoding="utf-8")


def main() -> None:
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    (target / "tokenizers").mkdir(parents=True)
    for encoder, head, fusion in MODELS:
        save_model(target / "models" / f"{encoder}.{head}.{fusion}", encoder, head, fusion)
    xlm_roberta = AutoTokenizer.from_pretrained(resolve_encoder("packaged:multilingual-e5-small"))
    tokenizers = {"generic": generic_tokenizer(), "bert": bert_tokenizer(), "xlm-roberta": xlm_roberta}
    for name, tokenizer in tokenizers.items():
        save_tokenizer(target / "tokenizers" / name, tokenizer)


if __name__ == "__main__":
    main()
