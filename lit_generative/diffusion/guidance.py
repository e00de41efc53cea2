"""Guidance: two predictions, and a step from the worse to the better one and beyond."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.schedules import Level, NoiseSchedule
from lit_generative.recipe import Recorded, describe
from lit_generative.tensor_ops import expand_like


class Guidance(Recorded, ABC):
    """What a sampler makes of the network's output: ``bad + scale * (good - bad)``.

    Args:
        scale: 1 is the good prediction, 0 the bad one; above 1 goes beyond the good one.
        interval: Guide only where ``sigma / alpha`` lies above the first number and not above the second
            (Kynkaanniemi et al. 2024, arXiv:2404.07724); elsewhere the network's own output is taken. None guides
            everywhere.

    Attributes:
        needs_null_class: Whether the network is asked without a label, for which it must have learned from some.

    Raises:
        ValueError: If ``scale`` is negative, or the interval is empty.
    """

    needs_null_class: bool = False

    def __init__(self, scale: float, interval: tuple[float, float] | None = None) -> None:
        who = type(self).__name__
        if not 0 <= scale < math.inf:
            raise ValueError(f"{who}: scale must be at least 0 and finite, got {scale}. 1 is no guidance.")
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise ValueError(
                f"{who}: interval must be two values of sigma / alpha, the smaller one first, got {list(interval)}."
            )
        self.scale = scale
        self.interval = interval

    def check(self, network: nn.Module, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        """Refuse a model that cannot be guided so; takes any, unless a leaf says otherwise.

        Args:
            network: The model's.
            schedule: Its noise levels.
            parameterization: What the network predicts.

        Raises:
            ValueError: If the model does not fit.
        """

    def active(self, level: Level) -> bool:
        """Whether to guide at this noise level; elsewhere the network's own output is taken."""
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        low, high = self.interval
        return low < (level.sigma / level.alpha if level.alpha > 0 else math.inf) <= high

    @abstractmethod
    def evaluate(
        self, network: nn.Module, inputs: Tensor, times: Tensor, y: Tensor | None, null_class: int | None
    ) -> tuple[Tensor, Tensor]:
        """Ask for two predictions.

        Args:
            network: ``network(inputs, times, y)``.
            inputs: What it sees, ``(N, ...)``.
            times: ``(N,)``.
            y: Labels, ``(N,)``, or None.
            null_class: The label that means none, if the network has classes.

        Returns:
            The prediction to follow and the one to leave behind, each as the network gives it.

        Raises:
            ValueError: If something that it needs is None.
        """

    def combine(self, good: Tensor, bad: Tensor) -> Tensor:
        """The guided prediction, same shape as both."""
        return bad + self.scale * (good - bad)


class ClassifierFree(Guidance):
    """Away from what the network predicts without the label; both predictions come from one batch of twice the size.

    Source: Ho & Salimans 2022, eq. 6 (arXiv:2207.12598), whose w is ``scale - 1``.

    Args:
        scale: 1 is the conditional model, 0 the unconditional one.
        interval: As in :class:`Guidance`.
        rescale: Share, in ``[0, 1]``, of a prediction that was brought back to the standard deviation of the
            conditional one, example by example (Lin et al. 2024, eq. 15 and 16, arXiv:2305.08891).

    Raises:
        ValueError: If ``rescale`` lies outside ``[0, 1]``, or as :class:`Guidance`.
    """

    needs_null_class = True

    def __init__(self, scale: float, interval: tuple[float, float] | None = None, rescale: float = 0.0) -> None:
        super().__init__(scale, interval)
        if not 0 <= rescale <= 1:
            raise ValueError(f"ClassifierFree: rescale must lie in [0, 1], got {rescale}.")
        self.rescale = rescale

    @override
    def evaluate(
        self, network: nn.Module, inputs: Tensor, times: Tensor, y: Tensor | None, null_class: int | None
    ) -> tuple[Tensor, Tensor]:
        if y is None or null_class is None:
            raise ValueError(
                "ClassifierFree: needs labels and a network with num_classes. Leave the guidance out without them."
            )
        labels = torch.cat([y, torch.full_like(y, null_class)])
        good, bad = network(torch.cat([inputs, inputs]), torch.cat([times, times]), labels).chunk(2)
        return good, bad

    @override
    def combine(self, good: Tensor, bad: Tensor) -> Tensor:
        guided = super().combine(good, bad)
        if self.rescale == 0:
            return guided
        wanted, own = (x.flatten(start_dim=1).std(dim=1, correction=0) for x in (good, guided))
        # A network whose last layer starts at zero predicts a constant: there is nothing to scale.
        factor = torch.where(own > 0, wanted / own, 1.0)
        return guided * expand_like(1 + self.rescale * (factor - 1), guided)


class Autoguidance(Guidance):
    """Away from what a weaker network predicts: one of fewer updates, or a smaller one, trained in the same way.

    The guide is not trained, and a checkpoint of the guided model does not hold its weights, but names their file.

    Source: Karras et al. 2024, eq. 3 (arXiv:2406.02507), whose w is ``scale``.

    Args:
        guide: ``guide(x_t, t, y)``, as :class:`lit_generative.loading.CheckpointNetwork` builds it.
        scale: 1 is the model alone, 0 the guide alone.
        interval: As in :class:`Guidance`.

    Raises:
        ValueError: If ``guide`` has weights and does not say from which checkpoint, or as :class:`Guidance`.
    """

    def __init__(self, guide: nn.Module, scale: float, interval: tuple[float, float] | None = None) -> None:
        super().__init__(scale, interval)
        if not hasattr(guide, "checkpoint") and next(guide.parameters(), None) is not None:
            raise ValueError(
                "Autoguidance: guide must say which checkpoint its weights are from, or nobody could build it again, "
                f"and a {type(guide).__name__} does not. Give a lit_generative.loading.CheckpointNetwork."
            )
        self.guide = guide.requires_grad_(False).eval()

    @override
    def check(self, network: nn.Module, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        for name in ("sample_shape", "num_classes", "extra_channels"):
            own, other = (getattr(net, name, None) for net in (network, self.guide))
            if hasattr(self.guide, name) and (other or None) != (own or None):
                raise ValueError(f"Autoguidance: guide and network must have the same {name}, got {other} and {own}.")
        for name, part in (("schedule", schedule), ("parameterization", parameterization)):
            if hasattr(self.guide, name) and (other := describe(getattr(self.guide, name))) != describe(part):
                raise ValueError(
                    f"Autoguidance: the guide must have been trained with the model's {name}, or its prediction means "
                    f"something else, got {other} and {describe(part)}."
                )

    @override
    def evaluate(
        self, network: nn.Module, inputs: Tensor, times: Tensor, y: Tensor | None, null_class: int | None
    ) -> tuple[Tensor, Tensor]:
        return network(inputs, times, y), self.guide.to(inputs.device)(inputs, times, y)
