"""The noise that data is mixed with in training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import full_precision


class Coupling(Recorded, ABC):
    """Which noise of a batch goes with which example."""

    @abstractmethod
    def partners(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Index of the noise ``eps`` for each example of ``x0``, both ``(N, ...)``: a permutation, ``(N,)`` int64."""


class MinibatchOT(Coupling):
    """The pairing of least total squared distance within this process's batch.

    Only the noise changes places: an example keeps its label. Given a label, the noise is then no longer quite standard
    normal, since it chose among all classes.

    Source: Pooladian et al. 2023, sec. 3.2 (arXiv:2304.14772); Tong et al. 2023, sec. 3.2 (arXiv:2302.00482).
    """

    @override
    @torch.no_grad()
    def partners(self, x0: Tensor, eps: Tensor) -> Tensor:
        # Half a second to import; only who couples should wait for it.
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        # The squares of the two themselves add the same to every pairing.
        with full_precision(x0.device):
            cost = -x0.flatten(start_dim=1).float() @ eps.flatten(start_dim=1).float().T
        _, columns = linear_sum_assignment(cost.cpu().numpy())
        return torch.from_numpy(columns).to(x0.device)


class NoiseSource(Recorded):
    """Standard normal noise, drawn independently of the data unless told otherwise.

    Args:
        offset: Standard deviation of what is added to a whole channel of an image, so that its mean brightness has to
            be found too (Guttenberg 2023, "Diffusion with Offset Noise", uses 0.1). Samplers start without it.
        perturbation: Standard deviation of noise that is mixed in, but must not be found: in sampling the network meets
            its own errors. Source: Ning et al. 2023, algorithm 1 (arXiv:2301.11706), who use 0.1.
        coupling: Pairs noise and data; None leaves them as drawn.

    Raises:
        ValueError: If ``offset`` or ``perturbation`` is negative or infinite; with ``offset`` for data that is no
            image.
    """

    def __init__(self, offset: float = 0.0, perturbation: float = 0.0, coupling: Coupling | None = None) -> None:
        for name, value in (("offset", offset), ("perturbation", perturbation)):
            if not 0 <= value < math.inf:
                raise ValueError(f"NoiseSource: {name} must be at least 0 and finite, got {value}.")
        self.offset, self.perturbation, self.coupling = offset, perturbation, coupling

    def draw(self, x0: Tensor) -> Tensor:
        """The noise that the network has to find in ``x_t``, the shape of ``x0``, ``(N, ...)``."""
        eps = torch.randn_like(x0)
        if self.offset > 0:
            if x0.ndim < 3:
                raise ValueError(
                    f"NoiseSource: offset is for images (N, C, H, W), got {tuple(x0.shape)}. Leave it out for points."
                )
            ones = [1] * (x0.ndim - 2)
            eps = eps + self.offset * torch.randn(*x0.shape[:2], *ones, dtype=x0.dtype, device=x0.device)
        return eps if self.coupling is None else eps[self.coupling.partners(x0, eps)]

    def shown(self, eps: Tensor) -> Tensor:
        """The noise that is mixed into ``x_t``, same shape: the same, unless the input is perturbed."""
        return eps + self.perturbation * torch.randn_like(eps) if self.perturbation > 0 else eps
