"""The adversarial term of an autoencoder: its losses, its weight, and what it asks of the networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MIN_GRADIENT = 1e-4
MAX_WEIGHT = 1e4


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimizes: it gains nothing beyond a logit of one.

    Source: Lim & Ye 2017 (arXiv:1705.02894), as a mean over the patches of an image.

    Args:
        real_logits: Of data, P for each image, ``(N, P)``.
        fake_logits: Of reconstructions, ``(N, P)``.

    Returns:
        ``(N,)``.
    """
    return (torch.relu(1 - real_logits) + torch.relu(1 + fake_logits)).mean(dim=1)


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """What the autoencoder minimizes beside its bound: ``(N,)`` of logits ``(N, P)``; source as above."""
    return -fake_logits.mean(dim=1)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """The weight that makes two terms pull equally hard at the decoder's last weight.

    Source: Esser, Rombach & Ommer 2021, eq. 7 (arXiv:2012.09841). Two things come from its authors' program, not from
    the text: 1e-4 below the line, where the text has 1e-6, and the bound of 1e4.

    Args:
        reconstruction_gradient: Gradient of the first term with respect to the weight.
        adversarial_gradient: That of the second, same shape.

    Returns:
        Ratio of the norms, a scalar in ``[0, 1e4]`` without a graph.
    """
    norms = [torch.linalg.vector_norm(g.detach()) for g in (reconstruction_gradient, adversarial_gradient)]
    return (norms[0] / (norms[1] + MIN_GRADIENT)).clamp(max=MAX_WEIGHT)


def last_weight(decoder: nn.Module) -> nn.Parameter:
    """The weight that gradients are compared at: ``decoder.last_weight``, or its last parameter that is no vector.

    Raises:
        ValueError: If there is none, or it is not trained.
    """
    name, found = type(decoder).__name__, getattr(decoder, "last_weight", None)
    weight = found if found is not None else next((p for p in reversed(list(decoder.parameters())) if p.ndim > 1), None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        raise ValueError(
            f"AdversarialVAE: the decoder must have a last weight to compare gradients at, and {name} has none that is "
            "trained. Give it an attribute last_weight, a parameter."
        )
    return weight


def common_latent_shape(encoder: nn.Module, decoder: nn.Module) -> tuple[int, ...]:
    """Shape of one latent, ``(D,)`` or ``(D, h, w)``, as the encoder states it.

    Raises:
        ValueError: If it states none, or the decoder another.
    """
    shape, expected = _latent_shape(encoder), _latent_shape(decoder)
    if expected is None and hasattr(decoder, "dim") and hasattr(decoder, "grid_size"):
        expected = (int(decoder.dim), int(decoder.grid_size), int(decoder.grid_size))  # type: ignore[arg-type]
    if shape is None:
        raise ValueError(
            f"AdversarialVAE: the encoder must give mean and logvar and state their latent_shape, which "
            f"{type(encoder).__name__} does not. Use ConvMapEncoder, or ConvEncoder."
        )
    if expected is not None and expected != shape:
        raise ValueError(
            f"AdversarialVAE: encoder and decoder must have latents of the same shape, got {shape} and {expected}."
        )
    return shape


def check_no_labels(networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks, by the name of the argument, that want a label.

    Raises:
        ValueError: If one has classes.
    """
    for name, network in networks.items():
        if (num_classes := getattr(network, "num_classes", None)) is not None:
            raise ValueError(
                f"AdversarialVAE: the {name} must take no labels, got {type(network).__name__} with num_classes="
                f"{num_classes}. Leave num_classes out."
            )


def _latent_shape(network: nn.Module) -> tuple[int, ...] | None:
    if hasattr(network, "latent_shape"):
        return tuple(network.latent_shape)  # type: ignore[arg-type]
    return (int(network.latent_dim),) if hasattr(network, "latent_dim") else None  # type: ignore[arg-type]
