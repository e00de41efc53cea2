"""Variational autoencoders (Kingma & Welling 2014, arXiv:1312.6114)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.tensor_ops import Generators, evaluating, randn
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch
from lit_generative.vae.distributions import reparameterize
from lit_generative.vae.likelihoods import Likelihood
from lit_generative.vae.objectives import Draws, Objective


class VAE(GenerativeModule):
    """Encoder, decoder and a bound between them; prior ``N(0, I)``.

    Args:
        encoder: ``encoder(x)`` gives mean and logvar of the posterior, each ``(N, D)``.
        decoder: ``decoder(z)`` gives what the likelihood reads, ``(N, C, H, W)``; has a ``latent_dim``.
        likelihood: Meaning of the decoder's output.
        objective: What is minimized.
        optimizer: Optimizer of both networks.
        scheduler: Learning rate, stepped once an update.

    Raises:
        ValueError: If encoder and decoder do not agree on ``latent_dim``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        objective: Objective,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.latent_dim = int(decoder.latent_dim)  # type: ignore[arg-type]
        if getattr(encoder, "latent_dim", self.latent_dim) != self.latent_dim:
            raise ValueError(
                f"VAE: encoder and decoder must have the same latent_dim, got {encoder.latent_dim} and "
                f"{self.latent_dim}."
            )
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler

    @property
    def sampling_modules(self) -> list[str]:
        """Both networks: reconstructions and bounds need the encoder that belongs to the decoder."""
        return ["encoder", "decoder"]

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for(
            "vae", [*self.encoder.parameters(), *self.decoder.parameters()], self.optimizer, self.scheduler
        )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws = self.draw(batch["image"], self.objective.num_draws)
        loss = self.objective.loss(draws)
        if self.log_now:
            self.log_losses({"loss": loss, **_terms(draws)}, in_bar=("loss", "reconstruction", "kl"))
        return loss.mean()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        draws = self.draw(batch["image"], self.objective.num_draws)
        self.log_evaluation(stage, {"loss": self.objective.loss(draws), **_terms(draws)})

    def draw(self, x: Tensor, num_draws: int) -> Draws:
        """Encode, draw and decode.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            num_draws: Draws of ``z`` for each image, K.

        Returns:
            The terms every objective is made of, in float32.
        """
        mean, logvar = (value.float() for value in self.encoder(x))
        z = reparameterize(mean, logvar, num_draws)
        output = self.decoder(z.flatten(0, 1)).float()
        log_likelihood = self.likelihood.log_prob(output, x.expand(num_draws, *x.shape).flatten(0, 1))
        return Draws(log_likelihood.unflatten(0, (num_draws, len(x))), z, mean, logvar)

    @override
    @torch.no_grad()
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw ``z`` from the prior and give the expected image.

        Args:
            num: How many.
            label: Must be None: the model has no classes.
            generator: Source of the noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, C, H, W)`` in ``[-1, 1]``, float32.
        """
        self.labels_for(num, label, generator)
        z = randn((num, self.latent_dim), generator, self.device)
        with evaluating(self.decoder):
            return self.likelihood.mean(self.decoder(z).float())

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Expected image at the posterior's mean, ``(N, C, H, W)`` in ``[-1, 1]``."""
        with evaluating(self):
            mean, _ = self.encoder(x)
            return self.likelihood.mean(self.decoder(mean).float())


def _terms(draws: Draws) -> dict[str, Tensor]:
    reconstruction = -draws.log_likelihood.mean(dim=0)
    return {"reconstruction": reconstruction, "kl": draws.kl, "elbo": -(reconstruction + draws.kl)}
