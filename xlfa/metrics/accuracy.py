"""Accuracy, and that of always giving the most frequent label, from 0 to 100."""

import collections

import datasets
import evaluate

_DESCRIPTION = """
From 0 to 100. accuracy: share of predictions that equal their reference. majority_rate: accuracy of always giving the
most frequent reference.
"""
_INPUTS = "predictions, references: lists of label numbers of the same length."
_CITATION = ""


class Accuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        right = sum(prediction == reference for prediction, reference in zip(predictions, references))
        most = max(collections.Counter(references).values())
        return {
            "accuracy": 100.0 * right / len(references),
            "majority_rate": 100.0 * most / len(references),
        }
