"""Text that must not break a page, and trained models for its tests."""

import torch
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForQuestionAnswering

SCRIPT = "<script>document.title='run'</script>"
IMAGE = "<img src=x onerror=\"document.title='run'\">"
# None: what a cleared field may send.
HOSTILE = {
    "none": None,
    "empty": "",
    "blanks": " \t\n\u3000",
    "invisible": "\u200b\u200d\ufeff",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "mixed directions": "the קט sat على the mat\u202e!",
    "script": SCRIPT,
    "image": IMAGE,
    "templates": "${document.title='run'} {{7*7}} {% raw %}",
    "special tokens": "[CLS] a [SEP] <s> b </s> [PAD]",
    "half a surrogate pair": "a \ud800 b",
    "controls": "a\x00b\x1b[31mc",
    "long": "the cat sat on the mat. " * 400,
    "one long word": "a" * 3000,
    "too long": "a " * 30_000,
}
FUSIONS = {
    "literal": {"fusion": "dlfa", "fusion_layer": 2},
    "sigmoid": {"fusion": "dlfa", "fusion_layer": 2, "fusion_gate": "sigmoid", "fusion_layer_norm": True},
    "learned": {"fusion": "dlfa", "fusion_layer": "learned", "fusion_gate": "sigmoid"},
    "aff": {"fusion": "aff", "fusion_layer": 2},
    "scalar_mix": {"fusion": "scalar_mix"},
    "none": {"fusion": "none"},
}


def question_model(encoder, **fields):
    """An untrained model on an encoder, with every number of its fusion away from where it starts."""
    torch.manual_seed(3)
    model = XLFAForQuestionAnswering.from_encoder(encoder, input_length=160, input_stride=32, **fields).eval()
    with torch.no_grad():
        for parameter in [] if model.xlfa.fusion is None else model.xlfa.fusion.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.qa_outputs.weight.normal_()
    return model, AutoTokenizer.from_pretrained(encoder)
