"""Autoencoders with an adversarial term, the first stage of latent diffusion.

Source: a discriminator beside a VAE: Larsen et al. 2016 (arXiv:1512.09300); the weight that balances its gradient:
Esser, Rombach & Ommer 2021 (VQGAN, arXiv:2012.09841); continuous latents with a tiny KL weight: Rombach et al. 2022,
sec. 3.1 and app. G (arXiv:2112.10752).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.tensor_ops import Generators, evaluating, frozen, full_precision, randn, to_float32
from lit_generative.training.checks import check_gives_logits
from lit_generative.training.labels import check_labels
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch
from lit_generative.vae.adversarial import (
    adaptive_weight,
    check_no_labels,
    common_latent_shape,
    discriminator_hinge,
    generator_hinge,
    last_weight,
)
from lit_generative.vae.distributions import reparameterize
from lit_generative.vae.likelihoods import Likelihood, check_first, with_state
from lit_generative.vae.objectives import Draws
from lit_generative.vae.priors import StandardNormal


class AdversarialVAE(GenerativeModule):
    """A VAE of tiny KL weight whose reconstructions a discriminator has to take for data.

    One batch is one update of each network. The autoencoder minimizes (Rombach et al. 2022, eq. 25)::

        -log p(x | z) + kl_weight * KL(q(z|x) || N(0, I)) - adversarial_weight * adaptive * D(x_hat)

    with hinge losses (Lim & Ye 2017, arXiv:1705.02894), and ``adaptive`` the ratio of what the first and the last term
    pull at the decoder's last weight. There is no perceptual loss: the papers add LPIPS to the first term.

    ``val/`` and ``test/`` hold all losses but ``autoencoder_loss``, whose adaptive weight only training knows.

    Args:
        encoder: ``encoder(x)`` gives mean and logvar of the posterior, each ``(N, D)`` or ``(N, D, h, w)``; has a
            ``latent_shape``, or a ``latent_dim``.
        decoder: ``decoder(z)`` gives what the likelihood reads.
        discriminator: ``discriminator(x)`` gives logits ``(N,)``, or some for each image, ``(N, ...)``.
        likelihood: Meaning of the decoder's output; the discriminator sees its mean.
        optimizer: Optimizer of the autoencoder, and of a likelihood that learns.
        discriminator_optimizer: Optimizer of the discriminator.
        kl_weight: Weight of the KL term, both in nats summed over an example.
        adversarial_weight: Weight of the adversarial term, before the adaptive one.
        start_step: Updates of the autoencoder before the adversarial term and the discriminator's training begin.
        scheduler: Learning rate of the autoencoder, stepped once an update.
        discriminator_scheduler: Learning rate of the discriminator, stepped once an update of its own, so that it
            begins at ``start_step``.

    Attributes:
        kl_weight: As above; a callback may lower it in the course of training.

    Raises:
        ValueError: If a number is negative, the networks do not fit each other or take labels, or the discriminator
            ends in a sigmoid.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        discriminator: nn.Module,
        likelihood: Likelihood,
        optimizer: OptimizerCallable,
        discriminator_optimizer: OptimizerCallable,
        kl_weight: float = 1e-6,
        adversarial_weight: float = 0.5,
        start_step: int = 0,
        scheduler: LRSchedulerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        numbers = {"kl_weight": kl_weight, "adversarial_weight": adversarial_weight, "start_step": start_step}
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"AdversarialVAE: {name} must not be negative, got {value}.")
        check_no_labels({"encoder": encoder, "decoder": decoder, "discriminator": discriminator})
        check_gives_logits("AdversarialVAE", discriminator)
        last_weight(decoder)  # refuses a decoder without one
        self.latent_shape = common_latent_shape(encoder, decoder)
        self.encoder = encoder
        self.decoder = decoder
        self.discriminator = discriminator
        self.likelihood = likelihood
        self.optimizer = optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.kl_weight = kl_weight
        self.adversarial_weight = adversarial_weight
        self.start_step = start_step
        self.scheduler = scheduler
        self.discriminator_scheduler = discriminator_scheduler
        self._checked: set[str] = set()

    @property
    def sampling_modules(self) -> list[str]:
        """The autoencoder: the discriminator is no part of the model."""
        return ["encoder", "decoder", *with_state(self, "likelihood")]

    @override
    def configure_optimizers(self) -> Any:
        own = [p for name, p in self.named_parameters() if not name.startswith("discriminator.")]
        judging = self.discriminator.parameters()
        return [
            self.optimizer_for("autoencoder", own, self.optimizer, self.scheduler),
            self.optimizer_for("discriminator", judging, self.discriminator_optimizer, self.discriminator_scheduler),
        ]

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        # Called after the update, which global_step counts by now.
        asleep = self.trainer.global_step <= self.start_step
        if not (asleep and scheduler.optimizer is self.trainer.optimizers[1]):
            super().lr_scheduler_step(scheduler, metric)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        autoencoder_optimizer, discriminator_optimizer = self.optimizers()  # type: ignore[misc, attr-defined]
        x, adversarial = batch["image"], self.trainer.global_step >= self.start_step
        losses, x_hat = self._pass("train", x)
        if adversarial:
            losses |= self._update_discriminator(discriminator_optimizer, x, x_hat.detach())
        losses |= self._update_autoencoder(autoencoder_optimizer, losses, x_hat if adversarial else None)
        self.step_schedulers()
        self.log_losses(losses, in_bar=("reconstruction", "generator_loss", "discriminator_loss"))

    def _update_discriminator(self, optimizer: LightningOptimizer, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        verdicts = self._verdicts(x, x_hat)
        self.manual_backward(verdicts["discriminator_loss"].mean())
        self.step_uncounted(optimizer)
        return verdicts

    def _update_autoencoder(
        self, optimizer: LightningOptimizer, losses: dict[str, Tensor], x_hat: Tensor | None
    ) -> dict[str, Tensor]:
        """One update, without the adversarial term if ``x_hat`` is None."""
        optimizer.zero_grad()
        loss, new = losses["reconstruction"] + self.kl_weight * losses["kl"], {}
        if x_hat is not None:
            with frozen(self.discriminator):
                generator_loss = generator_hinge(self._judge(x_hat))
            adaptive = self._adaptive_weight(losses["reconstruction"], generator_loss)
            loss = loss + self.adversarial_weight * adaptive * generator_loss
            new = {"generator_loss": generator_loss, "adaptive_weight": adaptive}
        self.manual_backward(loss.mean())
        self.step_counted(optimizer)
        return {"autoencoder_loss": loss, **new}

    def _adaptive_weight(self, reconstruction: Tensor, generator_loss: Tensor) -> Tensor:
        """:func:`adaptive_weight` of the gradients of the whole batch, that of all processes."""
        weight = last_weight(self.decoder)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        one = torch.ones((), device=self.device)
        scale = one if scaler is None else scaler.scale(one)  # else float16 would lose small gradients
        means = [scale * loss.mean() for loss in (reconstruction, generator_loss)]
        with full_precision(self.device):
            gradients = torch.stack([torch.autograd.grad(mean, weight, retain_graph=True)[0] for mean in means])
        if isinstance(self.trainer.strategy, DDPStrategy):
            torch.distributed.all_reduce(gradients)
            gradients /= self.trainer.world_size
        return adaptive_weight(*(gradients / scale))

    def _pass(self, stage: str, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the bound, ``(N,)`` float32, and the expected image ``(N, C, H, W)`` of one draw."""
        check_first(self.likelihood, x, stage, self._checked)
        mean, logvar = self.posterior(x)
        output = to_float32(self.decoder(self._draw(mean, logvar)))
        reconstruction = -self.likelihood.log_prob(output, x)
        kl = self.kl_by_dimension(mean, logvar).flatten(start_dim=1).sum(dim=1)
        return {"reconstruction": reconstruction, "kl": kl}, self.likelihood.mean(output)

    def _draw(self, mean: Tensor, logvar: Tensor) -> Tensor:
        return reparameterize(mean, logvar)[0]

    def _judge(self, images: Tensor) -> Tensor:
        """Logits ``(N, P)`` float32, P for each image."""
        logits: Tensor = to_float32(self.discriminator(images))
        if len(logits) != len(images):
            raise ValueError(
                f"AdversarialVAE: the discriminator must give each of {len(images)} images logits of its own, "
                f"(N,) or (N, ...), got shape {tuple(logits.shape)}."
            )
        return logits.reshape(len(images), -1)

    def _verdicts(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        real, fake = self._judge(x), self._judge(x_hat)
        return {
            "discriminator_loss": discriminator_hinge(real, fake),
            "real_logits": real.mean(dim=1),
            "fake_logits": fake.mean(dim=1),
        }

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        losses, x_hat = self._pass(stage, batch["image"])
        verdicts = self._verdicts(batch["image"], x_hat)
        losses["elbo"] = -losses["reconstruction"] - losses["kl"]  # with the KL term's whole weight
        self.log_evaluation(stage, losses | verdicts | {"generator_loss": -verdicts["fake_logits"]})

    @property
    def is_discrete(self) -> bool:
        """Whether the likelihood is one of 8-bit pixels, so that bits per dimension are defined."""
        return self.likelihood.discrete

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of ``q(z|x)``, each ``(N, *latent_shape)`` float32.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            y: None: the model has no classes.

        Raises:
            ValueError: If ``y`` is not None.
        """
        check_labels("AdversarialVAE", len(x), None, y)
        mean, logvar = self.encoder(x)
        return to_float32(mean), to_float32(logvar)

    def kl_by_dimension(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """``KL(q(z|x) || N(0, I))`` of each number of the latent, nats, ``(N, *latent_shape)``."""
        return StandardNormal().kl_by_dimension(mean, logvar)

    def log_importance_weights(self, x: Tensor, num_draws: int, y: Tensor | None = None) -> Tensor:
        """``log p(x, z) / q(z|x)`` of draws, nats, ``(num_draws, N)``; ``y`` as in :meth:`posterior`."""
        mean, logvar = self.posterior(x, y)
        z = reparameterize(mean, logvar, num_draws)
        output = to_float32(self.decoder(z.flatten(0, 1)))
        log_likelihood = self.likelihood.log_prob(output, x.expand(num_draws, *x.shape).flatten(0, 1))
        return Draws(
            log_likelihood=log_likelihood.unflatten(0, (num_draws, len(x))),
            z=z.flatten(start_dim=2),
            mean=mean.flatten(start_dim=1),
            logvar=logvar.flatten(start_dim=1),
        ).log_weight

    @override
    @torch.no_grad()
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Decode draws from ``N(0, I)``, which a small KL weight keeps the latents only roughly near.

        Args:
            num: How many.
            label: None: the model has no classes.
            generator: Source of the noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, C, H, W)`` in ``[-1, 1]``, float32.
        """
        self.labels_for(num, label, generator)
        return self.decode(randn((num, *self.latent_shape), generator, self.device))

    @torch.no_grad()
    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The posterior's mean, ``(N, *latent_shape)``; arguments as in :meth:`posterior`."""
        with evaluating(self):
            return self.posterior(x, y)[0]

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Expected images ``(N, C, H, W)`` in ``[-1, 1]`` of latents ``(N, *latent_shape)``; ``y`` likewise."""
        check_labels("AdversarialVAE", len(z), None, y)
        with evaluating(self):
            return self.likelihood.mean(to_float32(self.decoder(z)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Expected images at the posterior's mean, ``(N, C, H, W)`` in ``[-1, 1]``; ``y`` likewise."""
        return self.decode(self.encode(x, y), y)
