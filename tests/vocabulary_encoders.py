"""Tiny encoders with the tokenizers that a vocabulary can be changed of, for the tests of xlfa/vocabulary."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, XLMRobertaTokenizer

KEPT = ["The cat sat on the mat.", "Der Kater saß auf der Matte."]
OTHER = ["A dog runs home.", "Ein Hund läuft heim."]
BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def save_encoder(folder, tokenizer, seed=0):
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def unigram_tokenizer():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator((KEPT + OTHER) * 3, trainer)
    backend.add_special_tokens(["<mask>"])
    return XLMRobertaTokenizer(tokenizer_object=backend, model_max_length=64)


def wordpiece_backend():
    """Special tokens stand behind the first letters, as BERT's do not stand at 0, 1, 2 either."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", *(f"[unused{number}]" for number in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special)
    backend.train_from_iterator((KEPT + OTHER) * 3, trainer)
    return backend


def pieces(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


def last_states(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    return states * inputs["attention_mask"].unsqueeze(-1)
