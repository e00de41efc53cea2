"""Adversarial losses: logits in, one value per example out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded


class AdversarialLoss(Recorded, ABC):
    """What the discriminator and the generator each minimize, as functions of the discriminator's logits."""

    @abstractmethod
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Loss of the discriminator.

        Args:
            real_logits: Verdicts on data, ``(N,)``.
            fake_logits: Verdicts on samples, ``(N,)``.

        Returns:
            ``(N,)``.
        """

    @abstractmethod
    def generator_loss(self, fake_logits: Tensor) -> Tensor:
        """Loss of the generator.

        Args:
            fake_logits: Verdicts on samples, ``(N,)``.

        Returns:
            ``(N,)``.
        """


class NonSaturating(AdversarialLoss):
    """Binary cross-entropy, with ``-log D(G(z))`` for the generator.

    Source: Goodfellow et al. 2014, sec. 3 (arXiv:1406.2661).
    """

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return F.softplus(-real_logits) + F.softplus(fake_logits)

    @override
    def generator_loss(self, fake_logits: Tensor) -> Tensor:
        return F.softplus(-fake_logits)


class Hinge(AdversarialLoss):
    """Hinge loss: the discriminator gains nothing beyond ``margin``.

    Source: Lim & Ye 2017 (arXiv:1705.02894); Miyato et al. 2018, eq. 16-17 (arXiv:1802.05957).

    Args:
        margin: Logit beyond which a verdict is good enough.

    Raises:
        ValueError: If ``margin`` is not positive.
    """

    def __init__(self, margin: float = 1.0) -> None:
        if margin <= 0:
            raise ValueError(f"Hinge: margin must be positive, got {margin}. The papers use 1.")
        self.margin = margin

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return torch.relu(self.margin - real_logits) + torch.relu(self.margin + fake_logits)

    @override
    def generator_loss(self, fake_logits: Tensor) -> Tensor:
        return -fake_logits
