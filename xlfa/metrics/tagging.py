"""Span F1, precision, recall and accuracy of sequences of tags, as seqeval computes them."""

import datasets
import evaluate

_DESCRIPTION = """
From 0 to 100. f1, precision, recall: over spans, micro-averaged, equal to seqeval's (conlleval's rules, no scheme).
accuracy: share of right tags. missed_words: share of words without a predicted tag. Such a word counts as "O": outside
of every span, and wrong where the reference knows no "O".

Tags without a prefix, such as those of parts of speech, are read by the same rules, as XTREME scores them: the first
letter is taken for the prefix and the rest for the type. So neighbours with the same tag are one span (each SCONJ and
SYM is one of its own), and an X has no edge at the edge of a sentence.
"""
_INPUTS = """
predictions: list of lists of tags, None where a word has none. references: list of lists of tags of the same lengths.
"""
_CITATION = """
Nakayama 2018, seqeval (github.com/chakki-works/seqeval); Tjong Kim Sang and De Meulder 2003, CoNLL-2003 (conlleval);
Hu et al. 2020, XTREME (arXiv 2003.11080)
"""

OUTSIDE = "O"


class Tagging(evaluate.Metric):
    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        scores = {}
        for name, fractions in count_tags(predictions, references).items():
            part, whole = map(sum, zip(*fractions))
            scores[name] = 100.0 * part / whole if whole else 0.0
        return scores


def count_tags(predictions, references):
    """Score → (numerator, denominator) of each sentence: the score is the ratio of their sums, 0 where that is 0/0.

    A span belongs to the sentence that it ends in.
    """
    filled = [[OUTSIDE if tag is None else tag for tag in tags] for tags in predictions]
    predicted, true = spans(filled), spans(references)
    sentence_of = [number for number, tags in enumerate(references) for _ in range(len(tags) + 1)]
    spans_in = [[0] * len(references) for _ in range(3)]
    for counts, found in zip(spans_in, (predicted & true, predicted, true)):
        for _, _, last in found:
            counts[sentence_of[last]] += 1
    words = list(map(len, references))
    right = [sum(map(str.__eq__, *sentence)) for sentence in zip(filled, references)]
    missed = [tags.count(None) for tags in predictions]
    common, predicted, true = spans_in
    return {
        "f1": [(2 * both, one + other) for both, one, other in zip(common, predicted, true)],
        "precision": list(zip(common, predicted)),
        "recall": list(zip(common, true)),
        "accuracy": list(zip(right, words)),
        "missed_words": list(zip(missed, words)),
    }


def spans(sentences):
    """The set of (type, first, last) of the spans; positions count over all sentences, with one between them."""
    found = set()
    first = 0
    previous, previous_type = OUTSIDE, ""
    # The word between two sentences, and behind the last one, ends what the one before left open.
    for position, tag in enumerate(tag for sentence in sentences for tag in [*sentence, OUTSIDE]):
        prefix, type_ = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        if _ends(previous, previous_type, prefix, type_):
            found.add((previous_type, first, position - 1))
        if _starts(previous, previous_type, prefix, type_):
            first = position
        previous, previous_type = prefix, type_
    return found


def _ends(previous, previous_type, prefix, type_):
    """Whether a span ends between two words."""
    return (
        previous in "ES" or (previous in "BI" and prefix in "BSO") or (previous not in "O." and previous_type != type_)
    )


def _starts(previous, previous_type, prefix, type_):
    """Whether a span starts between two words."""
    return prefix in "BS" or (previous in "ESO" and prefix in "EI") or (prefix not in "O." and previous_type != type_)
