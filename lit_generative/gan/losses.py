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

    needs_real: bool = False
    """Whether the generator's loss looks at verdicts on data, too."""

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
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Loss of the generator.

        Args:
            fake_logits: Verdicts on samples, ``(N,)``.
            real_logits: Verdicts on data, ``(N,)``, if ``needs_real``; else None.

        Returns:
            ``(N,)``.
        """


class Minimax(AdversarialLoss):
    """Binary cross-entropy; the generator minimizes ``log(1 - D(G(z)))``, which is flat where samples are worst.

    Source: Goodfellow et al. 2014, eq. 1 (arXiv:1406.2661).

    Args:
        real_label: The discriminator's target for data, a probability; 0.9 smooths it on one side (Salimans et al.
            2016, sec. 3.4, arXiv:1606.03498). The generator's target stays 1.
        fake_label: Its target for samples. Above 0 it rewards samples for staying where they are, says that source.

    Raises:
        ValueError: If not ``0 <= fake_label < real_label <= 1``.
    """

    def __init__(self, real_label: float = 1.0, fake_label: float = 0.0) -> None:
        _check_targets("Minimax", real_label, fake_label)
        self.real_label = real_label
        self.fake_label = fake_label

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return _cross_entropy(real_logits, self.real_label) + _cross_entropy(fake_logits, self.fake_label)

    @override
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -F.softplus(fake_logits)


class NonSaturating(AdversarialLoss):
    """Binary cross-entropy, with ``-log D(G(z))`` for the generator.

    Source: Goodfellow et al. 2014, sec. 3 (arXiv:1406.2661).

    Args:
        real_label: As in :class:`Minimax`.
        fake_label: As in :class:`Minimax`.

    Raises:
        ValueError: If not ``0 <= fake_label < real_label <= 1``.
    """

    def __init__(self, real_label: float = 1.0, fake_label: float = 0.0) -> None:
        _check_targets("NonSaturating", real_label, fake_label)
        self.real_label = real_label
        self.fake_label = fake_label

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return _cross_entropy(real_logits, self.real_label) + _cross_entropy(fake_logits, self.fake_label)

    @override
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return F.softplus(-fake_logits)


class LeastSquares(AdversarialLoss):
    """Half the squared distance of each logit to its target.

    Source: Mao et al. 2017, eq. 2 (arXiv:1611.04076). The paper's other choice, ``a=-1, b=1, c=0``, minimizes
    Pearson's chi-squared divergence (its sec. 3.2).

    Args:
        a: The discriminator's target for samples.
        b: Its target for data.
        c: The generator's target for samples.

    Raises:
        ValueError: If ``a`` is not below both ``b`` and ``c``.
    """

    def __init__(self, a: float = 0.0, b: float = 1.0, c: float = 1.0) -> None:
        if not a < min(b, c):
            raise ValueError(
                f"LeastSquares: the fake target a must be below b (data) and c (generator), got a={a}, b={b}, c={c}. "
                "The paper uses (0, 1, 1) and (-1, 1, 0)."
            )
        self.a = a
        self.b = b
        self.c = c

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return 0.5 * ((real_logits - self.b).square() + (fake_logits - self.a).square())

    @override
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return 0.5 * (fake_logits - self.c).square()


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
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -fake_logits


class Wasserstein(AdversarialLoss):
    """Difference of the critic's verdicts; the critic must be kept Lipschitz by a penalty or a constraint.

    Source: Arjovsky, Chintala & Bottou 2017, eq. 2 (arXiv:1701.07875).
    """

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return fake_logits - real_logits

    @override
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -fake_logits


class RelativisticPairing(AdversarialLoss):
    """Binary cross-entropy of "this image is more real than that sample", pair by pair.

    Source: Jolicoeur-Martineau 2018, RSGAN (arXiv:1807.00734). It has no bad basins where modes are dropped: Sun et al.
    2020 (arXiv:2011.04926). It wants R1 and R2 penalties: Huang et al. 2024 (arXiv:2501.05441).
    """

    needs_real = True

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return F.softplus(fake_logits - _comparable("RelativisticPairing", fake_logits, real_logits))

    @override
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return F.softplus(_comparable("RelativisticPairing", fake_logits, real_logits) - fake_logits)


class RelativisticAverage(AdversarialLoss):
    """Binary cross-entropy of "more real than the other side's mean", for data and samples both.

    The mean is that of the logits given: of one process and one part of an accumulated batch.

    Source: Jolicoeur-Martineau 2018, RaSGAN (arXiv:1807.00734).
    """

    needs_real = True

    @override
    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return F.softplus(fake_logits.mean() - real_logits) + F.softplus(fake_logits - real_logits.mean())

    @override
    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        # The same with the sides exchanged.
        return self.discriminator_loss(fake_logits, _comparable("RelativisticAverage", fake_logits, real_logits))


def _cross_entropy(logits: Tensor, label: float) -> Tensor:
    """``-label * log(sigmoid(logits)) - (1 - label) * log(1 - sigmoid(logits))``, for each logit."""
    if label == 1:
        return F.softplus(-logits)
    return F.softplus(logits) - label * logits


def _check_targets(who: str, real_label: float, fake_label: float) -> None:
    if not 0 <= fake_label < real_label <= 1:
        raise ValueError(
            f"{who}: labels are probabilities with 0 <= fake_label < real_label <= 1, got real_label={real_label}, "
            f"fake_label={fake_label}. Smooth with real_label=0.9; 1 and 0 turn it off."
        )


def _comparable(who: str, fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
    if real_logits is None or real_logits.shape != fake_logits.shape:
        shape = None if real_logits is None else tuple(real_logits.shape)
        raise ValueError(
            f"{who}: each sample is compared with data, so real_logits must have the shape of fake_logits, "
            f"{tuple(fake_logits.shape)}, got {shape}. Judge as many images as samples."
        )
    return real_logits
