"""A penalty that fades as training goes on."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lit_generative.gan.penalties import Discriminator, Penalty


class Decaying(Penalty):
    """Another penalty, whose strength falls exponentially: strong while the game is unstable, weak at the end.

    A discriminator under a strong penalty is smooth, and cannot see detail finer than that.

    Source: the decaying gamma of Huang et al. 2024, app. D (arXiv:2501.05441), there by a cosine.

    Args:
        penalty: What fades.
        final_share: Share of the strength that is left at ``total_steps`` and after.
        total_steps: Updates of the discriminator.

    Raises:
        ValueError: If ``final_share`` is not between 0 and 1, or ``total_steps`` below 1.
    """

    def __init__(self, penalty: Penalty, final_share: float, total_steps: int) -> None:
        if not 0 < final_share < 1:
            raise ValueError(f"Decaying: final_share must lie between 0 and 1, got {final_share}. 0.001 is a good one.")
        if total_steps < 1:
            raise ValueError(f"Decaying: total_steps must be at least 1, got {total_steps}.")
        self.penalty, self.final_share, self.total_steps = penalty, final_share, total_steps
        self.every_n_steps = penalty.every_n_steps

    @property
    @override
    def name(self) -> str:
        return self.penalty.name

    @override
    def share(self, step: int) -> float:
        return self.penalty.share(step) * self.final_share ** min(1.0, step / self.total_steps)

    @override
    def compute(self, discriminator: Discriminator, x: Tensor, x_hat: Tensor) -> Tensor:
        return self.penalty.compute(discriminator, x, x_hat)
