"""A codebook: every feature vector is replaced by the nearest of a few learned ones (VQ-VAE)."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import full_precision, perplexity, sum_per_example, to_float32


class Quantized(NamedTuple):
    """What became of feature maps ``(N, D, h, w)``."""

    z_q: Tensor
    """The nearest codes, ``(N, D, h, w)``; their gradient goes to the feature maps unchanged (straight-through)."""
    codes: Tensor
    """Indices of those codes, ``(N, h, w)`` int64."""
    commitment: Tensor
    """Squared distance of the feature maps to their codes, summed over channels and positions, ``(N,)``."""
    perplexity: Tensor
    """How many codes the batch uses, see :func:`lit_generative.tensor_ops.perplexity`; a scalar in ``[1, K]``."""


class VectorQuantizer(Recorded, nn.Module):
    """Nearest codes of a codebook that follows what it is shown, without a gradient or an optimizer.

    In training mode, after a batch is quantized, running averages of how many vectors each code was nearest to, and of
    their sum, take a step; a code is the quotient of the two. The first batch places the codes on vectors drawn from
    it. So is, later, a code whose running count fell below ``restart_below``. A code that is placed gets the count of
    uniform use: it then moves as slowly as the others, and has ``log(count / restart_below) / -log(decay)`` updates to
    find its use.

    Counts are of the joined batch of all processes, which must all call it: they then hold the same codebook, that of
    one process on the joined batch, and DDP's own broadcast of buffers before each step changes nothing. Accumulating
    gradients does not join batches: each takes its own step here, as batch norm's statistics do.

    Source: van den Oord, Vinyals & Kavukcuoglu 2017 (arXiv:1711.00937), sec. 3.1 and app. A.1; restart: Dhariwal et al.
    2020 (arXiv:2005.00341), sec. 3.1. Not in the papers: the first batch places the codes, a placed code's count, and
    ``epsilon``.

    Args:
        num_codes: Length of the codebook, K.
        dim: Length of a code, D.
        decay: Factor of the running averages at each batch.
        epsilon: Added to each running count, and the sum of counts then scaled back (Laplace's smoothing): a code that
            is hardly used does not divide by zero.
        restart_below: Least running count, in vectors per joined batch; None never restarts a code.

    Attributes:
        codebook: The codes, ``(K, D)``.
        counts: Running averages of vectors per batch, ``(K,)``.
        sums: Running averages of their sums, ``(K, D)``.
        initialized: Whether a batch has placed the codes; before, they are random.

    Raises:
        ValueError: If an argument is out of its range.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        restart_below: float | None = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("num_codes", num_codes), ("dim", dim)):
            if value < 1:
                raise ValueError(f"VectorQuantizer: {name} must be at least 1, got {value}.")
        if not 0 <= decay < 1:
            raise ValueError(f"VectorQuantizer: decay must be at least 0 and below 1, got {decay}.")
        if not epsilon > 0:
            raise ValueError(f"VectorQuantizer: epsilon must be positive, got {epsilon}.")
        if restart_below is not None and not restart_below > 0:
            raise ValueError(
                f"VectorQuantizer: restart_below must be positive, got {restart_below}. Set it to null to restart none."
            )
        self.num_codes, self.dim = num_codes, dim
        self.decay, self.epsilon, self.restart_below = decay, epsilon, restart_below
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("initialized", torch.tensor(False))
        self._begun = False

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize feature maps, in float32 at least; in training mode the codebook then learns from them.

        Args:
            z_e: Feature maps, ``(N, D, h, w)``.

        Returns:
            Codes and their distance. The perplexity is that of the joined batch in training mode, else of this batch.

        Raises:
            ValueError: If ``z_e`` has another number of axes or channels.
        """
        if z_e.ndim != 4 or z_e.shape[1] != self.dim:
            raise ValueError(f"VectorQuantizer: needs maps of shape (N, {self.dim}, h, w), got {tuple(z_e.shape)}.")
        with full_precision(z_e.device):
            z_e = to_float32(z_e)
            vectors = z_e.detach().movedim(1, -1)
            if self.training:
                self._begin(vectors.flatten(0, 2))
            codes = self._nearest(vectors.flatten(0, 2)).view(vectors.shape[:3])
            z_q = self.lookup(codes)
            commitment = sum_per_example((z_e - z_q).square())
            statistics = self._statistics(vectors.flatten(0, 2), codes.flatten())
            if self.training:
                statistics = self._learn(statistics, vectors.flatten(0, 2))
            return Quantized(z_e + (z_q - z_e).detach(), codes, commitment, perplexity(statistics[:, 0]))

    def lookup(self, codes: Tensor) -> Tensor:
        """The codes of indices ``(N, h, w)``: ``(N, D, h, w)``, without a gradient."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def _nearest(self, vectors: Tensor) -> Tensor:
        """Indices ``(P,)`` of the codes nearest to ``vectors``, ``(P, D)``; the first of several."""
        # Squared distance, less the vector's own square, which is the same for all codes.
        return torch.addmm(self.codebook.square().sum(dim=1), vectors, self.codebook.T, alpha=-2).argmin(dim=1)

    def _statistics(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """How many vectors each code is nearest to, and their sum: ``(K, 1 + D)``."""
        rows = torch.cat([vectors.new_ones(len(vectors), 1), vectors], dim=1)
        return rows.new_zeros(self.num_codes, 1 + self.dim).index_add_(0, codes, rows)

    @torch.no_grad()
    def _learn(self, statistics: Tensor, vectors: Tensor) -> Tensor:
        """Take the step of the running averages, app. A.1; returns the statistics of the joined batch."""
        # One exchange for both. What is to be done for which code is decided on the device: nobody waits for it.
        drawn = [] if self.restart_below is None else [self._drawn(vectors)]
        shared = _sum_over_processes(torch.cat([statistics, *drawn], dim=1))
        statistics = shared[:, : 1 + self.dim]
        self.counts.lerp_(statistics[:, 0], 1 - self.decay)
        self.sums.lerp_(statistics[:, 1:], 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) * (total / (total + self.num_codes * self.epsilon))
        self.codebook.copy_(self.sums / smoothed[:, None])
        if self.restart_below is not None:
            self._place(self.counts < self.restart_below, shared[:, 1 + self.dim :], statistics[:, 0].sum())
        return statistics

    def _place(self, chosen: Tensor, vectors: Tensor, num_vectors: Tensor) -> None:
        """Put the ``chosen`` codes, ``(K,)`` bool, on ``vectors``, ``(K, D)``, of a batch of so many."""
        count = (num_vectors / self.num_codes).expand_as(self.counts)
        self.counts.copy_(torch.where(chosen, count, self.counts))
        self.sums.copy_(torch.where(chosen[:, None], count[:, None] * vectors, self.sums))
        self.codebook.copy_(torch.where(chosen[:, None], vectors, self.codebook))

    def _drawn(self, vectors: Tensor) -> Tensor:
        """K vectors of the joined batch, by torch's generator; zeros for those that another process has.

        The joined batch is the processes' batches one after the other, as the data modules share it out.
        """
        num = len(vectors)
        joined = num * _num_processes()
        if joined >= self.num_codes:
            index = torch.randperm(joined, device=vectors.device)[: self.num_codes]
        else:
            index = torch.randint(joined, (self.num_codes,), device=vectors.device)
        if _num_processes() > 1:
            dist.broadcast(index, src=0)
            mine = index // num == dist.get_rank()
            return torch.where(mine[:, None], vectors[index % num], 0.0)
        return vectors[index]

    @torch.no_grad()
    def _begin(self, vectors: Tensor) -> None:
        """Before the first batch of this process: warn of too few vectors, and place the codes unless one has."""
        if self._begun:
            return
        self._begun = True
        joined = len(vectors) * _num_processes()
        least = self.num_codes * max(1.0, self.restart_below or 0.0)
        if joined < least:
            warnings.warn(
                f"VectorQuantizer: {self.num_codes} codes with restart_below={self.restart_below} want at least "
                f"{least:g} vectors in a batch (N * h * w, of all processes), got {joined}. Codes go unused, or are "
                "restarted before they find a use. Take fewer codes, a larger batch or grid, or a smaller "
                "restart_below.",
                stacklevel=3,
            )
        if not self.initialized:  # waits for the device, this once
            num = vectors.new_full((self.num_codes, 1), len(vectors))
            shared = _sum_over_processes(torch.cat([num, self._drawn(vectors)], dim=1))
            self._place(torch.ones_like(self.counts, dtype=torch.bool), shared[:, 1:], shared[0, 0])
            self.initialized.fill_(True)

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._begun = False


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's ``x``, in place."""
    if _num_processes() > 1:
        dist.all_reduce(x)
    return x
