"""The likelihood of held-out data, estimated by importance sampling, and how much of the code is used."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lit_generative.metrics.processes import sum_over_processes
from lit_generative.tensor_ops import derive_seed, evaluating
from lit_generative.types import SupportsLikelihood

MAX_LOGGED_DIMENSIONS = 256


class LikelihoodEvaluation(L.Callback):
    """Logs ``test/nll`` (nats), ``test/bits_per_dim`` where it is defined, active units and the KL of each dimension.

    The last where the prior has it in closed form and the code has at most 256 dimensions. ``test/mean_elbo`` is the
    ELBO averaged over all the draws, where the module's own ``test/elbo`` is that of a few. Where the code is a map,
    each number at each place is a dimension, and a unit.

    The negative log-likelihood of an example is ``-log 1/K sum_k p(x, z_k) / q(z_k|x)``, an upper bound that falls to
    the true one as K grows. It is computed in chunks, so that memory does not depend on K, and with random numbers of
    its own, so that it is the same each time. A unit is active if the variance of its posterior mean over the data is
    above 0.01; where none is, the posterior has collapsed, and a warning says so.

    Source: Burda, Grosse & Salakhutdinov 2016, sec. 5 and app. C (arXiv:1509.00519).

    Args:
        num_draws: K at the test; 5,000 in the literature.
        val_draws: K at each validation; None estimates no likelihood there, which takes K passes of the decoder.
        chunk_size: Draws at a time; on a CPU 20 take 0.7 of the time of 100, as they fit its caches.
        seed: Seed of the draws.

    Raises:
        ValueError: If a number is below 1; at an evaluation's end, if it had fewer than two images.
        TypeError: If the module has no posterior.
    """

    def __init__(
        self, num_draws: int = 5000, val_draws: int | None = None, chunk_size: int = 20, seed: int = 0
    ) -> None:
        for name, value in (("num_draws", num_draws), ("val_draws", val_draws), ("chunk_size", chunk_size)):
            if value is not None and value < 1:
                raise ValueError(f"LikelihoodEvaluation: {name} must be at least 1, got {value}.")
        self.num_draws, self.val_draws, self.chunk_size, self.seed = num_draws, val_draws, chunk_size, seed
        self._sums: Tensor | None = None  # of each unit: images, posterior means and their squares, (3, D) float64

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SupportsLikelihood):
            raise TypeError(f"LikelihoodEvaluation: {type(pl_module).__name__} has no posterior to draw from.")

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._observe(trainer, pl_module, "val", batch, batch_idx, self.val_draws)

    @override
    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._observe(trainer, pl_module, "test", batch, batch_idx, self.num_draws)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log_active_units(pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_active_units(pl_module, "test")

    @torch.no_grad()
    def _observe(
        self, trainer: L.Trainer, pl_module: Any, stage: str, batch: Any, batch_idx: int, num_draws: int | None
    ) -> None:
        x = batch["image"]
        y = None if pl_module.num_classes is None else batch["label"]
        with evaluating(pl_module), trainer.precision_plugin.forward_context(), isolate_rng():
            torch.manual_seed(derive_seed("likelihood", self.seed, batch_idx, trainer.global_rank))
            mean, logvar = cast(SupportsLikelihood, pl_module).posterior(x, y)
            bounds = None if num_draws is None else self.bounds(pl_module, x, y, num_draws)
        self._add(mean.flatten(start_dim=1))
        count = len(x) * trainer.world_size  # Lightning averages it over processes as a whole number
        options = {"batch_size": count, "sync_dist": True, "on_step": False, "on_epoch": True}
        kl = pl_module.kl_by_dimension(mean, logvar)
        if kl is not None and stage == "test" and kl[0].numel() <= MAX_LOGGED_DIMENSIONS:
            for i, value in enumerate(kl.mean(dim=0).flatten()):
                pl_module.log(f"{stage}/kl_of_dimension/{i:03d}", value, **options)
        if bounds is None:
            return
        nll, elbo = bounds
        pl_module.log(f"{stage}/nll", nll.mean(), **options)
        pl_module.log(f"{stage}/mean_elbo", elbo.mean(), **options)
        if pl_module.is_discrete:
            bits = nll / (math.log(2) * x[0].numel())
            pl_module.log(f"{stage}/bits_per_dim", bits.mean(), **options)

    def bounds(self, model: SupportsLikelihood, x: Tensor, y: Tensor | None, num_draws: int) -> tuple[Tensor, Tensor]:
        """Estimate the likelihood of images ``(N, C, H, W)`` with labels, if there are any.

        Returns:
            Negative log-likelihood by importance sampling, and ELBO, from the same draws: nats, each ``(N,)``.
        """
        total, elbo = x.new_full((len(x),), -math.inf), x.new_zeros(len(x))
        for start in range(0, num_draws, self.chunk_size):
            num = min(self.chunk_size, num_draws - start)
            log_weight = model.log_importance_weights(x, num, y)
            total = torch.logaddexp(total, torch.logsumexp(log_weight, dim=0))
            elbo += log_weight.sum(dim=0) / num_draws
        return math.log(num_draws) - total, elbo

    def _add(self, means: Tensor) -> None:
        """Count posterior means ``(N, D)``."""
        x = means.cpu().double()  # in this order: some devices have no float64
        sums = torch.stack([torch.ones_like(x), x, x.square()]).sum(dim=1)
        self._sums = sums if self._sums is None else self._sums + sums

    def _log_active_units(self, pl_module: L.LightningModule, stage: str) -> None:
        if self._sums is None:
            return
        num, total, squares = sum_over_processes(self._sums)
        self._sums = None
        if num[0] < 2:
            raise ValueError(
                f"LikelihoodEvaluation: a variance needs at least two images, got {int(num[0])}. Add some."
            )
        variance = (squares - total.square() / num) / (num - 1)
        active = int((variance > 0.01).sum())
        pl_module.log(f"{stage}/active_units", torch.tensor(float(active)), sync_dist=True)
        if active == 0:
            rank_zero_warn(
                f"LikelihoodEvaluation: none of {len(variance)} latent units is active: the posterior has collapsed to "
                "the prior. Warm the KL term up (KLWarmup), give it free bits, or weaken the decoder."
            )
