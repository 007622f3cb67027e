"""Texts of many scripts, and states and plans whose alignment is known, for the tests of alignment."""

import numpy as np
from hypothesis import strategies as st

from xlfa.alignment.aligner import Alignment, PairStates
from xlfa.alignment.words import Word

# Characters of many scripts and directions, joiners and marks, and what looks like a tokenizer's own.
SCRIPTS = "aZßé İабвגדهاقशनि猫坐のマแมวກຂកខကခ한국7٣.,、。؟!?'-▁½ﬁ😀👍🏽🇩🇪\u200d\u200b\u200f\u0301\ufe0f\t\n\u3000"
TEXTS = st.text(st.sampled_from(SCRIPTS), max_size=30) | st.text(max_size=12)
SENTENCES = {
    "en": ("The cat's on e-mail (3.14).", ["The", "cat's", "on", "e", "-", "mail", "(", "3.14", ")", "."]),
    "ar": ("جلست القطة، هنا؟", ["جلست", "القطة", "،", "هنا", "؟"]),
    "hi": ("बिल्ली चटाई पर बैठी।", ["बिल्ली", "चटाई", "पर", "बैठी", "।"]),
    "th": ("แมวนั่งอยู่บนพรม", ["แมว", "นั่ง", "อยู่", "บน", "พรม"]),
    "zh": ("我爱北京天安门。", ["我", "爱", "北京", "天安门", "。"]),
    "ja": ("猫はマットの上に座る。", ["猫", "は", "マット", "の", "上", "に", "座る", "。"]),
    "lo": ("ແມວນັ່ງຢູ່ເທິງ", ["ແມວ", "ນັ່ງ", "ຢູ່", "ເທິງ"]),
    "km": ("ឆ្មាអង្គុយលើកម្រាល", ["ឆ្មា", "អង្គុយ", "លើ", "កម្រាល"]),
    "my": ("ကြောင်သည်ဖျာပေါ်တွင်", ["ကြောင်", "သည်", "ဖျာ", "ပေါ်", "တွင်"]),
}


def make_states(source_states, target_states, source_words=None, target_words=None):
    """`PairStates` of pieces by themselves; the words of the pieces are given, or each piece is a word."""
    sides = {}
    for side, states, word_of_piece in (
        ("source", source_states, source_words),
        ("target", target_states, target_words),
    ):
        pieces = len(states)
        word_of_piece = np.arange(pieces) if word_of_piece is None else np.array(word_of_piece)
        words = [Word(f"{side}{index}", index, index + 1) for index in range(word_of_piece.max() + 1)]
        sides |= {
            f"{side}_words": words,
            f"{side}_pieces": [f"piece{index}" for index in range(pieces)],
            f"{side}_word_of_piece": word_of_piece,
            f"{side}_states": states,
            f"{side}_marginal": np.full(pieces, 1 / pieces),
        }
    return PairStates(**sides)


def make_alignment(weights, source_mass=None, target_mass=None, source=None, target=None):
    """An `Alignment` with that plan over words, one piece each; what the masses lack in it is unmatched."""
    weights = np.array(weights, dtype=float)
    source_mass = weights.sum(1) if source_mass is None else np.array(source_mass)
    target_mass = weights.sum(0) if target_mass is None else np.array(target_mass)
    return Alignment(
        source=source or [f"source{index}" for index in range(len(source_mass))],
        target=target or [f"target{index}" for index in range(len(target_mass))],
        weights=weights,
        source_mass=source_mass,
        target_mass=target_mass,
        null_source=(source_mass - weights.sum(1)).clip(min=0),
        null_target=(target_mass - weights.sum(0)).clip(min=0),
        source_pieces=[],
        target_pieces=[],
        piece_plan=weights,
        source_word_of_piece=np.arange(len(source_mass)),
        target_word_of_piece=np.arange(len(target_mass)),
        epsilon=0.02,
        perplexity=1.5,
        marginal_error=0.0,
        converged=True,
    )
