"""Variational autoencoders (Kingma & Welling 2014, arXiv:1312.6114)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.tensor_ops import Generators, evaluating, to_float32
from lit_generative.training.checks import labels_of
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch
from lit_generative.vae.distributions import reparameterize
from lit_generative.vae.likelihoods import Likelihood
from lit_generative.vae.objectives import Draws, Objective
from lit_generative.vae.priors import Prior, StandardNormal, VampPrior


class VAE(GenerativeModule):
    """Encoder, decoder, prior, and a bound between them.

    Args:
        encoder: ``encoder(x)``, or ``encoder(x, y)`` with classes, gives mean and logvar of the posterior, each
            ``(N, D)``.
        decoder: ``decoder(z)``, or ``decoder(z, y)``, gives what the likelihood reads; has a ``latent_dim``.
        likelihood: Meaning of the decoder's output.
        objective: What is minimized.
        optimizer: Optimizer of all of them.
        scheduler: Learning rate, stepped once an update.
        prior: Distribution of the latent; None for ``N(0, I)``.

    Attributes:
        kl_weight: Factor on the objective's KL term in training; a callback may change it.
        capacity: Nats that the objective ``Capacity`` aims at in training; None leaves it at its own.

    Raises:
        ValueError: If encoder and decoder do not agree on ``latent_dim`` or on the classes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        objective: Objective,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.latent_dim = int(decoder.latent_dim)  # type: ignore[arg-type]
        self.num_classes = getattr(decoder, "num_classes", None)
        for name, own in (("latent_dim", self.latent_dim), ("num_classes", self.num_classes)):
            if getattr(encoder, name, own) != own:
                raise ValueError(
                    f"VAE: encoder and decoder must have the same {name}, got {getattr(encoder, name)} and {own}."
                )
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.objective = objective
        self.prior = StandardNormal() if prior is None else prior
        if self.num_classes is not None and isinstance(self.prior, VampPrior):
            raise ValueError(
                "VAE: VampPrior's pseudo-inputs have no class. Leave num_classes out, or use another prior."
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.kl_weight = 1.0
        self.capacity: float | None = None
        self._checked: set[str] = set()

    @property
    def sampling_modules(self) -> list[str]:
        """All that a sample or a bound needs, the encoder that belongs to the decoder among them."""
        learned = [name for name in ("likelihood", "prior") if isinstance(getattr(self, name), nn.Module)]
        return ["encoder", "decoder", *(name for name in learned if self.get_submodule(name).state_dict())]

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("vae", self.parameters(), self.optimizer, self.scheduler)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws = self._draw_batch("train", batch, self.kl_weight, self.capacity)
        loss = self.objective.loss(draws)
        if self.log_now:
            self.log_losses({"loss": loss, **self._terms(draws)}, in_bar=("loss", "reconstruction", "kl"))
        return loss.mean()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        draws = self._draw_batch(stage, batch)
        self.log_evaluation(stage, {"loss": self.objective.loss(draws), **self._terms(draws)})

    def _draw_batch(self, stage: str, batch: Batch, kl_weight: float = 1.0, capacity: float | None = None) -> Draws:
        x, y = batch["image"], labels_of("VAE", batch, self.num_classes)
        if stage not in self._checked:  # once: it waits for the device
            self.likelihood.check(x)
            self._checked.add(stage)
        return self.draw(x, self.objective.num_draws, y, kl_weight, capacity)

    def draw(
        self,
        x: Tensor,
        num_draws: int,
        y: Tensor | None = None,
        kl_weight: float = 1.0,
        capacity: float | None = None,
    ) -> Draws:
        """Encode, draw and decode.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            num_draws: Draws of ``z`` for each image, K.
            y: Labels, ``(N,)`` int64, if the model has classes.
            kl_weight: Handed on to the objective.
            capacity: Likewise.

        Returns:
            The terms every objective is made of, in float32.
        """
        mean, logvar = self.posterior(x, y)
        z = self._latents(mean, logvar, num_draws)
        labels = None if y is None else y.repeat(num_draws)
        output = to_float32(self._decode(z.flatten(0, 1), labels))
        log_likelihood = self.likelihood.log_prob(output, x.expand(num_draws, *x.shape).flatten(0, 1))
        return Draws(
            log_likelihood.unflatten(0, (num_draws, len(x))),
            z,
            mean,
            logvar,
            self.prior,
            self.encoder,
            kl_weight,
            capacity,
        )

    def _latents(self, mean: Tensor, logvar: Tensor, num_draws: int) -> Tensor:
        return reparameterize(mean, logvar, num_draws)

    def _encode(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.encoder(x) if self.num_classes is None else self.encoder(x, y)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.decoder(z) if self.num_classes is None else self.decoder(z, y)

    def _terms(self, draws: Draws) -> dict[str, Tensor]:
        reconstruction = -draws.log_likelihood.mean(dim=0)
        bound = {"reconstruction": reconstruction, "kl": draws.kl, "elbo": -(reconstruction + draws.kl)}
        return bound | self.objective.terms(draws)

    @property
    def is_discrete(self) -> bool:
        """Whether the likelihood is one of 8-bit pixels, so that bits per dimension are defined."""
        return self.likelihood.discrete

    def log_importance_weights(self, x: Tensor, num_draws: int, y: Tensor | None = None) -> Tensor:
        """``log p(x, z) / q(z|x)`` of draws from the posterior, nats, ``(num_draws, N)``; see :meth:`draw`."""
        return self.draw(x, num_draws, y).log_weight

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of ``q(z|x)``, each ``(N, D)`` float32."""
        mean, logvar = self._encode(x, y)
        return to_float32(mean), to_float32(logvar)

    def kl_by_dimension(self, mean: Tensor, logvar: Tensor) -> Tensor | None:
        """``KL(q(z|x) || p(z))`` of each dimension, nats, ``(N, D)``; None if the prior has no closed form."""
        return self.prior.kl_by_dimension(mean, logvar)

    @override
    @torch.no_grad()
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw ``z`` from the prior and give the expected image.

        Args:
            num: How many.
            label: ``(num,)`` classes; None draws them uniformly if the model has classes.
            generator: Source of the noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, C, H, W)`` in ``[-1, 1]``, float32.
        """
        with evaluating(self):
            z = self.prior.sample(num, self.latent_dim, self.encoder, generator).to(self.device)
            return self.decode(z, self.labels_for(num, label, generator))

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Expected images ``(N, C, H, W)`` in ``[-1, 1]`` of latents ``(N, D)``, and of labels if there are any."""
        with evaluating(self):
            return self.likelihood.mean(self._decode(z, y).float())

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Expected image at the posterior's mean, ``(N, C, H, W)`` in ``[-1, 1]``."""
        with evaluating(self):
            return self.decode(self._encode(x, y)[0], y)
