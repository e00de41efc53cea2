"""Variational autoencoders (Kingma & Welling 2014, arXiv:1312.6114)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.tensor_ops import Generators, evaluating, full_precision, to_float32
from lit_generative.training.examples import training_images
from lit_generative.training.labels import labels_of
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch
from lit_generative.vae.distributions import reparameterize
from lit_generative.vae.flows import Flow
from lit_generative.vae.likelihoods import Likelihood, check_first, with_state
from lit_generative.vae.objectives import BaseDraws, Draws, Objective
from lit_generative.vae.priors import Prior, StandardNormal, VampPrior


class VAE(GenerativeModule):
    """Encoder, decoder, prior, and a bound between them.

    With a flow, a draw from the posterior is ``z = flow(z0)`` with ``z0 ~ N(mean, exp(logvar))`` of the encoder. Prior,
    decoder, :meth:`encode` and :meth:`decode` speak of ``z``; only :meth:`posterior` speaks of ``z0``.

    Args:
        encoder: ``encoder(x)``, or ``encoder(x, y)`` with classes, gives mean and logvar of the posterior, or of what
            its flow starts from, each ``(N, D)``.
        decoder: ``decoder(z)``, or ``decoder(z, y)``, gives what the likelihood reads; has a ``latent_dim``.
        likelihood: Meaning of the decoder's output.
        objective: What is minimized.
        optimizer: Optimizer of all of them.
        scheduler: Learning rate, stepped once an update.
        prior: Distribution of the latent; None for ``N(0, I)``.
        flow: Makes the posterior of the encoder's Gaussian; None leaves it Gaussian.

    Attributes:
        kl_weight: Factor on the objective's KL term in training; a callback may change it.
        capacity: Nats that the objective ``Capacity`` aims at in training; None leaves it at its own.

    Raises:
        ValueError: If the decoder has no ``latent_dim``; if encoder, decoder and flow do not agree on it or on the
            classes, or the objective or the prior cannot have a flow.
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
        flow: Flow | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not hasattr(decoder, "latent_dim"):
            raise ValueError(
                f"VAE: decoder must have a latent_dim, the length of its latent vectors, and {type(decoder).__name__} "
                "has none. Maps, as of ConvMapEncoder and ConvFeatureDecoder, are for an AdversarialVAE."
            )
        self.latent_dim = int(decoder.latent_dim)  # type: ignore[arg-type]
        if flow is None:  # else the latents that decode() takes are no draws from posterior(), as a LatentCodec's are
            self.latent_shape = (self.latent_dim,)
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
        if (own := getattr(self.prior, "latent_dim", self.latent_dim)) != self.latent_dim:
            raise ValueError(
                f"VAE: the decoder and {type(self.prior).__name__} must have the same latent_dim, got "
                f"{self.latent_dim} and {own}."
            )
        if self.num_classes is not None and isinstance(self.prior, VampPrior):
            raise ValueError(
                "VAE: VampPrior's pseudo-inputs have no class. Leave num_classes out, or use another prior."
            )
        origin = torch.zeros(1, self.latent_dim)
        if self.prior.kl_by_dimension(origin, origin) is None:
            self.objective.check_prior(self.prior)
        self.flow = flow
        self._check_flow()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.kl_weight = 1.0
        self.capacity: float | None = None
        self._checked: set[str] = set()

    def _check_flow(self) -> None:
        if self.flow is None:
            return
        name = type(self.flow).__name__
        if self.flow.latent_dim != self.latent_dim:
            raise ValueError(
                f"VAE: the decoder and {name} must have the same latent_dim, got {self.latent_dim} and "
                f"{self.flow.latent_dim}."
            )
        if isinstance(self.prior, VampPrior):
            raise ValueError(
                f"VAE: VampPrior is made of posteriors, whose density after {name} is not known at a given z. Leave "
                "the flow out, or use another prior, as GaussianMixturePrior."
            )
        self.objective.check_flow()

    @property
    def has_capacity(self) -> bool:
        """Whether the objective aims at a KL of ``capacity``."""
        return self.objective.has_capacity

    @property
    def sampling_modules(self) -> list[str]:
        """All that a sample or a bound needs: encoder and flow, which belong to the decoder, among them."""
        return ["encoder", "decoder", *with_state(self, "flow", "likelihood", "prior")]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and isinstance(self.prior, VampPrior) and self.prior.from_data:
            # A checkpoint's pseudo-inputs are loaded after this, and stay.
            self.prior.begin_with(training_images(self.trainer, len(self.prior.pseudo_inputs), "VAE: a VampPrior"))

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
        check_first(self.likelihood, x, stage, self._checked)
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
        z, base = self._flowed(self._latents(mean, logvar, num_draws))
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
            base,
        )

    def _latents(self, mean: Tensor, logvar: Tensor, num_draws: int) -> Tensor:
        return reparameterize(mean, logvar, num_draws)

    def _flowed(self, z0: Tensor) -> tuple[Tensor, BaseDraws | None]:
        """Final latents ``(K, N, D)``, and where the flow started."""
        if self.flow is None:
            return z0, None
        with full_precision(z0.device):  # a density: half precision would cost digits of the bound
            z, log_det = self.flow(z0)
        return z, BaseDraws(z0, log_det)

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
        """Mean and logarithm of the variance of ``q(z|x)``, each ``(N, D)`` float32.

        With a flow, those of the Gaussian before it, whose units are what counts as active; what :meth:`decode` takes
        lies behind it, and :meth:`encode` gives that.
        """
        mean, logvar = self._encode(x, y)
        return to_float32(mean), to_float32(logvar)

    def kl_by_dimension(self, mean: Tensor, logvar: Tensor) -> Tensor | None:
        """``KL(q(z|x) || p(z))`` of each dimension, nats, ``(N, D)``; None if prior or flow leave no closed form."""
        return None if self.flow is not None else self.prior.kl_by_dimension(mean, logvar)

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
    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents ``(N, D)`` float32 that stand for images: the posterior's mean, or what the flow makes of it.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            y: Labels, ``(N,)`` int64, if the model has classes.
        """
        with evaluating(self):
            mean, _ = self.posterior(x, y)
            return self._flowed(mean.unsqueeze(0))[0].squeeze(0)

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Expected images ``(N, C, H, W)`` in ``[-1, 1]`` of latents ``(N, D)``, and of labels if there are any."""
        with evaluating(self):
            return self.likelihood.mean(self._decode(z, y).float())

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Expected image at :meth:`encode`'s latents, ``(N, C, H, W)`` in ``[-1, 1]``."""
        return self.decode(self.encode(x, y), y)
