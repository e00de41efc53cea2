"""Generative adversarial networks (Goodfellow et al. 2014, arXiv:1406.2661)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.gan.losses import AdversarialLoss
from lit_generative.tensor_ops import Generators, evaluating, frozen, randn
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch


class GAN(GenerativeModule):
    """Two networks that take turns; one batch of the loader is one update of the generator.

    With ``discriminator_steps`` of k the batch is split into k parts, one for each update of the discriminator: every
    update sees fresh images, and ``global_step``, batches and the loggers' steps are one count.

    Args:
        generator: ``generator(z, y)`` with ``z`` of shape ``(N, latent_dim)`` gives samples; has a ``latent_dim``.
        discriminator: ``discriminator(x, y)`` gives logits ``(N,)``.
        loss: What each minimizes.
        generator_optimizer: Optimizer of the generator.
        discriminator_optimizer: Optimizer of the discriminator.
        discriminator_steps: Updates of the discriminator for each of the generator.
        generator_scheduler: Learning rate of the generator, stepped once a generator update.
        discriminator_scheduler: Learning rate of the discriminator, stepped once a generator update.

    Raises:
        ValueError: If ``discriminator_steps`` is below 1, or only one of the networks takes labels.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: AdversarialLoss,
        generator_optimizer: OptimizerCallable,
        discriminator_optimizer: OptimizerCallable,
        discriminator_steps: int = 1,
        generator_scheduler: LRSchedulerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if discriminator_steps < 1:
            raise ValueError(f"GAN: discriminator_steps must be at least 1, got {discriminator_steps}.")
        self.num_classes = getattr(generator, "num_classes", None)
        if getattr(discriminator, "num_classes", None) != self.num_classes:
            raise ValueError(
                f"GAN: generator and discriminator must take the same labels, got num_classes={self.num_classes} and "
                f"{getattr(discriminator, 'num_classes', None)}. Give both the same num_classes, or none."
            )
        self.generator = generator
        self.discriminator = discriminator
        self.loss = loss
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.discriminator_steps = discriminator_steps
        self.generator_scheduler = generator_scheduler
        self.discriminator_scheduler = discriminator_scheduler

    @property
    def sampling_modules(self) -> list[str]:
        """The generator alone: the discriminator is no part of the model."""
        return ["generator"]

    @override
    def configure_optimizers(self) -> Any:
        return [
            self.optimizer_for(
                "generator", self.generator.parameters(), self.generator_optimizer, self.generator_scheduler
            ),
            self.optimizer_for(
                "discriminator",
                self.discriminator.parameters(),
                self.discriminator_optimizer,
                self.discriminator_scheduler,
            ),
        ]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()  # type: ignore[misc, attr-defined]
        losses: dict[str, Tensor] = {}
        parts = self._split(batch)
        for k, (x, y) in enumerate(parts, start=1):
            # The last samples serve both updates; the earlier ones are the discriminator's alone.
            with contextlib.nullcontext() if k == len(parts) else torch.no_grad():
                x_hat = self.generator(self._latent(x), y)
            real_logits, fake_logits = self._verdicts(x, x_hat.detach(), y)
            losses["discriminator_loss"] = self.loss.discriminator_loss(real_logits, fake_logits)
            discriminator_optimizer.zero_grad()
            self.manual_backward(losses["discriminator_loss"].mean())
            self.step_uncounted(discriminator_optimizer)
            losses |= {"real_logits": real_logits, "fake_logits": fake_logits}

        with frozen(self.discriminator):
            losses["generator_loss"] = self.loss.generator_loss(self.discriminator(x_hat, y).float())
        generator_optimizer.zero_grad()
        self.manual_backward(losses["generator_loss"].mean())
        generator_optimizer.step()

        self.step_schedulers()
        self.log_losses(losses, in_bar=("generator_loss", "discriminator_loss"))

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Verdicts on held-out data: real logits far below those in training say that the discriminator overfits."""
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        x, y = batch["image"], self._labels(batch)
        x_hat = self.generator(self._latent(x), y)
        real_logits, fake_logits = self._verdicts(x, x_hat, y)
        self.log_evaluation(
            stage,
            {
                "discriminator_loss": self.loss.discriminator_loss(real_logits, fake_logits),
                "generator_loss": self.loss.generator_loss(fake_logits),
                "real_logits": real_logits,
                "fake_logits": fake_logits,
            },
        )

    @override
    @torch.no_grad()
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw samples in evaluation mode.

        Args:
            num: How many.
            label: ``(num,)`` classes; None draws them uniformly if the model has classes.
            generator: Source of the noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            What the generator gives: images ``(num, C, H, W)`` in ``[-1, 1]``, or points ``(num, 2)``; float32.
        """
        z = randn((num, self.latent_dim), generator, self.device)
        y = self.labels_for(num, label, generator)
        with evaluating(self.generator):
            return self.generator(z, y).float()

    @property
    def latent_dim(self) -> int:
        """Dimension of ``z``, which the generator states."""
        return int(self.generator.latent_dim)  # type: ignore[arg-type]

    def _latent(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), self.latent_dim, device=x.device, dtype=x.dtype)

    def _verdicts(self, x: Tensor, x_hat: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.discriminator(x, y).float(), self.discriminator(x_hat, y).float()

    def _labels(self, batch: Batch) -> Tensor | None:
        return None if self.num_classes is None else batch["label"]

    def _split(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        x, y, k = batch["image"], self._labels(batch), self.discriminator_steps
        if len(x) < k:
            raise ValueError(
                f"GAN: a batch is split into discriminator_steps={k} parts, but it has {len(x)} examples. "
                f"Set the data's batch_size to {k} times what one update shall see."
            )
        labels = [None] * k if y is None else y.tensor_split(k)
        return list(zip(x.tensor_split(k), labels, strict=True))
