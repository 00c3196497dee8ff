"""`evaluate` module: rate of solved tasks with its 95 % Wilson interval."""

import datasets
import evaluate

from cjepa_hf.evaluation import metrics

_DESCRIPTION = "Rate of solved tasks with its 95 % Wilson score interval."
_INPUTS = """
Args:
    predictions: one bool per task, True where it was solved.
    baseline: if given, the results of another model on the same tasks; `difference` then compares the two.

Returns:
    rate, low, high (bounds of the interval), successes, n, and with a baseline `difference`: a dictionary with
    difference (rate of the predictions minus that of the baseline), low, high, only_first, only_second, p_value, n.
"""
_CITATION = (
    "Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference. JASA 22, 209-212."
)


class SuccessRate(evaluate.Metric):
    """See `cjepa_hf.evaluation.metrics.success_rate` and `paired_difference`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("bool")}),
        )

    def _compute(self, predictions, baseline=None):
        result = metrics.success_rate(predictions)
        if baseline is not None:
            result["difference"] = metrics.paired_difference(predictions, baseline)
        return result
