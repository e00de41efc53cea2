"""Inception score: how sure a classifier is of single images, and how many classes it sees in all."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.measures import Measure, logits_of


def inception_score(logits: Tensor) -> float:
    """``exp(E_x KL(p(y|x) || p(y)))``, between 1 and the number of classes.

    Source: Salimans et al. 2016, sec. 4 (arXiv:1606.03498).

    Args:
        logits: Class logits, ``(N, K)``.
    """
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - torch.tensor(float(len(logits)), dtype=torch.float64).log()
    return float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())


class InceptionScore(Measure):
    """:func:`inception_score` as ``is`` and ``is_std``: mean and standard deviation over parts of the images.

    It looks at no real image, and with another classifier than Inception it is another score.

    Args:
        splits: Number of consecutive parts, equal to within one image; 10 in the literature.

    Raises:
        ValueError: If there is no part, or fewer images than parts.
    """

    scores = ("is", "is_std")
    needs_logits = True
    needs_real = False

    def __init__(self, splits: int = 10) -> None:
        if splits < 1:
            raise ValueError(f"InceptionScore: splits must be at least 1, got {splits}.")
        self.splits = splits

    @override
    def compute(self, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
        logits = logits_of(fake, "InceptionScore")
        n = len(logits)
        if n < self.splits:
            raise ValueError(f"InceptionScore: needs at least {self.splits} images, one for each part, got {n}.")
        ends = [n * part // self.splits for part in range(1, self.splits)]  # as the paper's code cuts
        scores = torch.tensor([inception_score(part) for part in logits.tensor_split(ends)], dtype=torch.float64)
        return {"is": float(scores.mean()), "is_std": float(scores.std(correction=0))}
