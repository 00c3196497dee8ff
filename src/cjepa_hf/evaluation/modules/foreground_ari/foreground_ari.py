"""`evaluate` module: adjusted Rand index of object masks, over foreground pixels."""

import datasets
import evaluate
import numpy as np

from cjepa_hf.evaluation import metrics

_DESCRIPTION = (
    "Adjusted Rand index of object masks over the pixels that belong to an object (FG-ARI), mean over frames."
)
_INPUTS = """
Args:
    predictions: per frame an integer label for every pixel, [H, W].
    references: the true labels, likewise.
    background (int, defaults to 0): the label in references that is no object.

Returns:
    foreground_ari: 1 for equal partitions whatever their labels, 0 in expectation for random ones. Frames without an
    object are left out.
"""
_CITATION = "Hubert, L. and Arabie, P. (1985). Comparing partitions. Journal of Classification 2, 193-218."


class ForegroundAri(evaluate.Metric):
    """See `cjepa_hf.evaluation.metrics.foreground_ari`."""

    def _info(self):
        frame = datasets.List(datasets.List(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": frame, "references": frame}),
        )

    def _compute(self, predictions, references, background=0):
        score = metrics.foreground_ari(np.asarray(references), np.asarray(predictions), background)
        return {"foreground_ari": score}
