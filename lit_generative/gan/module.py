"""Generative adversarial networks (Goodfellow et al. 2014, arXiv:1406.2661)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lit_generative.gan.augmentation.base import Augmentation
from lit_generative.gan.checks import check_critic, check_discriminator, named_penalties
from lit_generative.gan.constraints import Constraint
from lit_generative.gan.losses import AdversarialLoss
from lit_generative.gan.penalties import Penalty
from lit_generative.gan.unrolling import Unrolling, Weights
from lit_generative.recipe import Recorded, describe
from lit_generative.tensor_ops import Generators, evaluating, frozen, full_precision, randn, to_float32
from lit_generative.training.labels import labels_of
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
        penalties: Terms on the discriminator's gradient, added to its loss.
        constraints: What is done to the discriminator's weights after each of its updates.
        augmentation: What both real images and samples go through before the discriminator sees them.
        unrolling: Lets the generator look ahead, past updates that the discriminator has still to make.
        accumulate_grad_batches: Parts in which each update's batch is passed, so that a large batch needs little
            memory; the update is that of the whole batch, but for batch norm and losses that compare within a batch.

    Raises:
        ValueError: If a number is below 1, only one of the networks takes labels, or the discriminator ends in a
            sigmoid.
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
        penalties: list[Penalty] | None = None,
        constraints: list[Constraint] | None = None,
        augmentation: Augmentation | None = None,
        unrolling: Unrolling | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        for name, value in (
            ("discriminator_steps", discriminator_steps),
            ("accumulate_grad_batches", accumulate_grad_batches),
        ):
            if value < 1:
                raise ValueError(f"GAN: {name} must be at least 1, got {value}.")
        check_discriminator(discriminator, penalties or [])
        check_critic(loss, discriminator, penalties or [], constraints or [])
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
        self.penalties = named_penalties(penalties or [])
        self.constraints = constraints or []
        self.augmentation = augmentation
        self.unrolling = unrolling
        self.accumulate_grad_batches = accumulate_grad_batches

    @property
    def sampling_modules(self) -> list[str]:
        """The generator alone: the discriminator is no part of the model."""
        return ["generator"]

    @override
    def configure_optimizers(self) -> Any:
        parts = (
            ("generator", self.generator, self.generator_optimizer, self.generator_scheduler),
            ("discriminator", self.discriminator, self.discriminator_optimizer, self.discriminator_scheduler),
        )
        return [self.optimizer_for(name, net.parameters(), built, rate) for name, net, built, rate in parts]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        parts = {name: describe(network) for name, network in networks.items() if isinstance(network, Recorded)}
        # So that the checkpoint needs no other file: a network may have been built from one.
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **parts}

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()  # type: ignore[misc, attr-defined]
        losses: dict[str, Tensor] = {}
        parts = self._split(batch)
        for k, (x, y) in enumerate(parts):
            # The last samples serve both updates, unless their activations would be too many to keep.
            shared = k == len(parts) - 1 and self.accumulate_grad_batches == 1
            z = self._latent(x)
            with contextlib.nullcontext() if shared else torch.no_grad():
                x_hat = _joined([self.generator(*micro) for micro in self._micro_batches(z, y)])
            losses |= self._update_discriminator(discriminator_optimizer, k, x, x_hat.detach(), y)
        losses |= self._update_generator(generator_optimizer, x, z, x_hat if shared else None, y)
        self.step_schedulers()
        self.log_losses(losses, in_bar=("generator_loss", "discriminator_loss"))

    def _update_discriminator(
        self, optimizer: LightningOptimizer, k: int, x: Tensor, x_hat: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """One update, of which ``k`` counts those in this batch."""
        optimizer.zero_grad()
        terms: list[dict[str, Tensor]] = []
        for x_part, x_hat_part, y_part in self._micro_batches(x, x_hat, y):
            real_logits, fake_logits = self._verdicts(x_part, x_hat_part, y_part)
            loss = self.loss.discriminator_loss(real_logits, fake_logits)
            penalties = self._penalties(self._update(k), x_part, x_hat_part, y_part)
            total = loss.mean() + sum(penalty.mean() for penalty in penalties.values())
            self.manual_backward(total * (len(x_part) / len(x)))
            values = {"discriminator_loss": loss, **penalties, "real_logits": real_logits, "fake_logits": fake_logits}
            terms.append({name: value.detach() for name, value in values.items()})
        self.step_uncounted(optimizer)
        for constraint in self.constraints:
            constraint.apply(self.discriminator)
        losses = {name: _joined([term[name] for term in terms]) for name in terms[0]}
        if self.augmentation is not None:
            self.augmentation.observe(losses["real_logits"], len(x) * self.trainer.world_size)
            losses |= self.augmentation.quantities()
        return losses

    def _update_generator(
        self, optimizer: LightningOptimizer, x: Tensor, z: Tensor, x_hat: Tensor | None, y: Tensor | None
    ) -> dict[str, Tensor]:
        """One update, with samples that still have their graph, or with samples made anew of the same latents."""
        optimizer.zero_grad()
        losses = []
        for x_part, z_part, x_hat_part, y_part in self._micro_batches(x, z, x_hat, y):
            if x_hat_part is None:
                x_hat_part = self.generator(z_part, y_part)
            with frozen(self.discriminator):
                ahead = self._look_ahead(x_part, x_hat_part, y_part)
                real_logits = self.judge(x_part, y_part, ahead) if self.loss.needs_real else None
                loss = self._generator_loss(self.judge(x_hat_part, y_part, ahead), real_logits)
            self.manual_backward(loss.mean() * (len(x_part) / len(x)))
            losses.append(loss.detach())
        self.step_counted(optimizer)
        return {"generator_loss": _joined(losses)}

    def _penalties(self, update: int, x: Tensor, x_hat: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """Those that are due at the discriminator's ``update``-th update, each ``(N,)``, in float32."""
        due = {name: penalty for name, penalty in self.penalties.items() if penalty.due(update)}
        if not due:
            return {}
        with full_precision(x.device):
            return {
                name: penalty.share(update) * penalty.compute(self._judge_of(y), to_float32(x), to_float32(x_hat))
                for name, penalty in due.items()
            }

    def _judge_of(self, y: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda images: self.judge(images, y)

    def _update(self, k: int) -> int:
        """How many updates of the discriminator came before the ``k``-th of this batch."""
        return self.trainer.global_step * self.discriminator_steps + k

    def _look_ahead(self, x: Tensor, x_hat: Tensor, y: Tensor | None) -> Weights | None:
        if self.unrolling is None:
            return None

        def loss(weights: Weights) -> Tensor:
            return self.loss.discriminator_loss(self.judge(x, y, weights), self.judge(x_hat, y, weights)).mean()

        return self.unrolling.look_ahead(self.discriminator, loss)

    def judge(self, images: Tensor, y: Tensor | None, weights: Weights | None = None) -> Tensor:
        """Logits of augmented images, float32: ``(N,)``, or ``(N / m,)`` if the discriminator packs ``m``.

        ``weights`` take the place of the discriminator's own, if they are given.
        """
        if self.augmentation is not None:
            images = self.augmentation(images)
        if weights is None:
            logits: Tensor = self.discriminator(images, y)
        else:
            logits = functional_call(self.discriminator, dict(weights), (images, y))
        judged: Tensor = to_float32(logits)
        return judged

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
                "generator_loss": self._generator_loss(fake_logits, real_logits),
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

    def _generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        if self.loss.needs_real:
            return self.loss.generator_loss(fake_logits, real_logits)
        return self.loss.generator_loss(fake_logits)

    def _latent(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), self.latent_dim, device=x.device, dtype=x.dtype)

    def _verdicts(self, x: Tensor, x_hat: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.judge(x, y), self.judge(x_hat, y)

    def _micro_batches(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The tensors in ``accumulate_grad_batches`` parts along the batch; None stays None."""
        n = self.accumulate_grad_batches
        return zip(*([None] * n if t is None else t.tensor_split(n) for t in tensors), strict=True)

    def _labels(self, batch: Batch) -> Tensor | None:
        return labels_of("GAN", batch, self.num_classes)

    def _split(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        x, y, k = batch["image"], self._labels(batch), self.discriminator_steps
        if len(x) < k * self.accumulate_grad_batches:
            raise ValueError(
                f"GAN: a batch is split into discriminator_steps={k} parts, each of accumulate_grad_batches="
                f"{self.accumulate_grad_batches}, but it has {len(x)} examples. Set the data's batch_size to {k} times "
                "what one update shall see."
            )
        labels = [None] * k if y is None else y.tensor_split(k)
        return list(zip(x.tensor_split(k), labels, strict=True))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
