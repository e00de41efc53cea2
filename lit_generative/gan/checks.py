"""What a GAN refuses before it trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from lit_generative.gan.constraints import Constraint
from lit_generative.gan.losses import AdversarialLoss, Wasserstein
from lit_generative.gan.penalties import Penalty, has_batch_norm
from lit_generative.training.checks import check_gives_logits


def check_discriminator(discriminator: nn.Module, penalties: Sequence[Penalty]) -> None:
    """Refuse probabilities where logits are wanted; warn of batch norm under a penalty.

    Raises:
        ValueError: If the last layer is a sigmoid.
    """
    check_gives_logits("GAN", discriminator)
    if penalties and has_batch_norm(discriminator):
        warnings.warn(
            f"GAN: {type(penalties[0]).__name__} is a penalty for each example, and batch norm makes a verdict depend "
            "on the whole batch (Gulrajani et al. 2017, sec. 4). Use a discriminator without it.",
            stacklevel=3,
        )


def check_critic(
    loss: AdversarialLoss,
    discriminator: nn.Module,
    penalties: Sequence[Penalty],
    constraints: Sequence[Constraint],
) -> None:
    """Warn of a Wasserstein loss whose critic nothing bounds: it is a distance for Lipschitz critics only."""
    normalized = any(parametrize.is_parametrized(module) for module in discriminator.modules())
    if isinstance(loss, Wasserstein) and not (penalties or constraints or normalized):
        warnings.warn(
            "GAN: the Wasserstein loss has no bound unless the critic is kept Lipschitz (Arjovsky et al. 2017). Add "
            "the penalty GradientPenalty, the constraint WeightClipping, or wrap the discriminator in SpectralNorm.",
            stacklevel=3,
        )


def named_penalties(penalties: Sequence[Penalty]) -> dict[str, Penalty]:
    """Penalties by the name they are logged under: ``gradient_penalty``, ``r1``.

    Raises:
        ValueError: If two have one name.
    """
    named = {penalty.name: penalty for penalty in penalties}
    if len(named) < len(penalties):
        raise ValueError(f"GAN: penalties must be of different kinds, got {[penalty.name for penalty in penalties]}.")
    return named
