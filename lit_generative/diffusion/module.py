"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.samplers import Sampler
from lit_generative.diffusion.schedules import NoiseSchedule
from lit_generative.recipe import describe
from lit_generative.tensor_ops import Generators, evaluating, expand_like, randn
from lit_generative.training.checks import labels_of
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch


class DDPM(GenerativeModule):
    """A network that learns to remove noise of every strength.

    Args:
        network: ``network(x_t, t, y)`` gives what ``parameterization`` says; has a ``sample_shape``.
        schedule: Noise levels.
        parameterization: What the network predicts.
        sampler: How samples are drawn.
        optimizer: Optimizer of the network.
        scheduler: Learning rate, stepped once an update.
        clip_samples: Keep the sampler's guess of the image in ``[-1, 1]``.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        sampler: Sampler,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        clip_samples: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        sampler.times(schedule.num_timesteps)  # refuses more steps than levels now, not after training
        self.num_classes = getattr(network, "num_classes", None)
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.sampler = sampler
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip_samples = clip_samples

    @property
    def sampling_modules(self) -> list[str]:
        """The network."""
        return ["network"]

    @override
    def sampling_settings(self) -> dict[str, Any]:
        return {"sampler": describe(self.sampler), "clip_samples": self.clip_samples}

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("network", self.network.parameters(), self.optimizer, self.scheduler)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.denoising_loss(batch)
        self.log_losses({"loss": loss}, in_bar=("loss",))
        return loss.mean()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_evaluation("val", {"loss": self.denoising_loss(batch)})

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_evaluation("test", {"loss": self.denoising_loss(batch)})

    def denoising_loss(self, batch: Batch) -> Tensor:
        """Squared error of the prediction at a uniformly drawn time.

        Source: Ho et al. 2020, eq. 14 (arXiv:2006.11239), as a mean over pixels.

        Args:
            batch: Clean images and their labels.

        Returns:
            ``(N,)``.
        """
        x0 = batch["image"]
        y = labels_of("DDPM", batch, self.num_classes)
        t = torch.randint(self.schedule.num_timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        alpha, sigma = (expand_like(value, x0) for value in self.schedule.alpha_sigma(t))
        x_t = alpha * x0 + sigma * eps
        error = self.network(x_t, t, y).float() - self.parameterization.target(x0, eps, alpha, sigma)
        return error.square().flatten(start_dim=1).mean(dim=1)

    @override
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw samples by walking from noise to data.

        Args:
            num: How many.
            label: ``(num,)`` classes; None draws them uniformly if the model has classes.
            generator: Source of all noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, *network.sample_shape)``, images in ``[-1, 1]``, float32.
        """
        x = torch.empty(0)
        for x, _ in self.trajectory(num, label, generator):  # noqa: B007  the last one is the sample
            pass
        return x

    def trajectory(
        self, num: int, label: Tensor | None = None, generator: Generators = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample, and show every step.

        Args:
            num: How many.
            label: As in :meth:`sample`.
            generator: As in :meth:`sample`.

        Yields:
            The batch after each step and the guess of the clean one, each ``(num, *network.sample_shape)``.
        """
        shape = (num, *self.network.sample_shape)  # type: ignore[misc]
        x_t = randn(shape, generator, self.device)
        y = self.labels_for(num, label, generator)
        denoise = Denoiser(self.network, self.schedule, self.parameterization, y, self.clip_samples)
        with evaluating(self.network):
            walk = self.sampler.trajectory(denoise, x_t, lambda: randn(shape, generator, self.device))
            while True:
                with torch.no_grad():  # not around the yield: the caller's own gradients are not ours to switch off
                    step = next(walk, None)
                if step is None:
                    return
                yield step
