"""How many codes of a codebook a data set uses."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lit_generative.tensor_ops import perplexity


class CodePerplexity(Metric):
    """Perplexity of the codes of all batches and processes together, which that of a batch falls short of.

    Source: van den Oord, Vinyals & Kavukcuoglu 2017 (arXiv:1711.00937) report it of their codes.

    Args:
        num_codes: Length of the codebook, K.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, codes: Tensor) -> None:
        """Count the codes of a batch, int64 in ``[0, K)`` and of any shape."""
        self.counts += codes.flatten().bincount(minlength=len(self.counts))

    @override
    def compute(self) -> Tensor:
        """A scalar in ``[1, K]``."""
        return perplexity(self.counts)
