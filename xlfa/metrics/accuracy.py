"""Accuracy from 0 to 100."""

import datasets
import evaluate

_DESCRIPTION = "Share of predictions that equal their reference, from 0 to 100."
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
        return {"accuracy": 100.0 * right / len(references)}
