"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.diffusion.checks import check_inpainting, check_model, check_shown, super_resolution_of
from lit_generative.diffusion.conditions import Condition
from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.inpainting import inpaint
from lit_generative.diffusion.latents import Latents
from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.objectives import DenoisingObjective, Prediction, Simple
from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.samplers import Sampler
from lit_generative.diffusion.schedules import NoiseSchedule
from lit_generative.diffusion.times import TimeSampling, UniformTimes
from lit_generative.recipe import Recorded, describe
from lit_generative.tensor_ops import Generators, evaluating, expand_like, randn
from lit_generative.training.examples import training_images
from lit_generative.training.labels import labels_of
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
        objective: What is minimized; None for the plain squared error, L_simple.
        times: Which times are trained at; None for all alike.
        noise: What data is mixed with; None for independent, standard normal noise.
        clip_samples: Keep the sampler's guess of the image in ``[-1, 1]``; None does so unless there is a codec.
        label_dropout: Probability that training hides a label, so that guidance may leave it out.
        self_conditioning: Show the network its last guess of the image (Chen et al. 2023, arXiv:2208.04202); half of
            the training batches see none.
        condition: What of the clean image the network sees, as in super-resolution.
        codec: A trained autoencoder: the network then works on its latents, scaled to unit variance.

    Raises:
        ValueError: If the parts do not fit each other.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        sampler: Sampler,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        objective: DenoisingObjective | None = None,
        times: TimeSampling | None = None,
        noise: NoiseSource | None = None,
        clip_samples: bool | None = None,
        label_dropout: float = 0.0,
        self_conditioning: bool = False,
        condition: Condition | None = None,
        codec: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes = getattr(network, "num_classes", None)
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.sampler = sampler
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.objective = Simple() if objective is None else objective
        self.times = UniformTimes() if times is None else times
        self.noise = NoiseSource() if noise is None else noise
        self.latents = None if codec is None else Latents(codec)
        self.latent_modules = [] if codec is None else ["network"]  # whose shape is not that of the data
        self.clip_samples = codec is None if clip_samples is None else clip_samples
        self.label_dropout = label_dropout
        self.self_conditioning = self_conditioning
        self.condition = condition
        check_model(self)

    @property
    def sampling_modules(self) -> list[str]:
        """The network."""
        return ["network"]

    @property
    def codec(self) -> nn.Module | None:
        """What turns images into latents and back, if anything."""
        return None if self.latents is None else self.latents.codec

    @override
    def sampling_settings(self) -> dict[str, Any]:
        return {"sampler": describe(self.sampler), "clip_samples": self.clip_samples}

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("network", self.network.parameters(), self.optimizer, self.scheduler)

    @override
    def on_fit_start(self) -> None:
        if self.latents is not None and not self.latents.measured:
            self.latents.measure(training_images(self.trainer, 2048, "DDPM: the scale of the codec's latents"))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # So that the checkpoint needs no other file: both parts may have been built from one.
        parts = {} if self.codec is None else {"codec": describe(self.codec)}
        if isinstance(self.network, Recorded):
            parts["network"] = describe(self.network)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **parts}

    # ---- training

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0, y = self._clean(batch), self._dropped(labels_of("DDPM", batch, self.num_classes))
        t, factor = self.times.draw(len(x0), self.schedule, x0.device)
        prediction = self.predict_noisy(x0, t, y, self._condition_of(batch))
        losses = self.objective.losses(prediction)
        self.times.observe(t, losses["loss"].detach())
        if factor is not None:
            losses = {name: factor * value for name, value in losses.items()}
        self.log_losses(losses, in_bar=("loss",))
        return losses["loss"].mean()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        """The loss at uniformly drawn times, with all labels."""
        x0, y = self._clean(batch), labels_of("DDPM", batch, self.num_classes)
        t = self.schedule.random_times(len(x0), x0.device)
        prediction = self.predict_noisy(x0, t, y, self._condition_of(batch))
        self.log_evaluation(stage, self.objective.losses(prediction))

    def predict_noisy(
        self, x0: Tensor, t: Tensor, y: Tensor | None = None, condition: Tensor | None = None
    ) -> Prediction:
        """Add noise, and ask the network.

        Args:
            x0: Clean data, or latents, ``(N, *network.sample_shape)``.
            t: Times, ``(N,)``.
            y: Labels, ``(N,)``, if the network has classes.
            condition: What it sees beside ``x_t``, ``(N, C', H, W)``.
        """
        eps = self.noise.draw(x0)
        alpha, sigma = (expand_like(value, x0) for value in self.schedule.alpha_sigma(t))
        x_t = alpha * x0 + sigma * self.noise.shown(eps)
        output, variance = self.denoiser(y, condition).predict(x_t, t)
        return Prediction(x0, eps, x_t, t, output, variance, self.schedule, self.parameterization)

    def _clean(self, batch: Batch) -> Tensor:
        return batch["image"] if self.latents is None else self.latents.encode(batch["image"])

    def _condition_of(self, batch: Batch) -> Tensor | None:
        return None if self.condition is None else self.condition.of(batch["image"])

    def _dropped(self, y: Tensor | None) -> Tensor | None:
        """Labels, some of them the null class."""
        if y is None or self.num_classes is None or self.label_dropout == 0:
            return y
        hidden = torch.rand(len(y), device=y.device) < self.label_dropout
        return torch.where(hidden, self.num_classes, y)

    # ---- sampling

    @override
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw samples by walking from noise to data.

        Args:
            num: How many.
            label: ``(num,)`` classes; None draws them uniformly if the model has classes.
            generator: Source of all noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, *shape)``, images in ``[-1, 1]`` (or points), float32.
        """
        return self._last(self._walk(num, label, generator))

    def trajectory(
        self, num: int, label: Tensor | None = None, generator: Generators = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample, and show every step.

        Args:
            num: How many.
            label: As in :meth:`sample`.
            generator: As in :meth:`sample`.

        Yields:
            The batch after each step and the guess of the clean one, each of the shape of the samples.
        """
        for x_t, x0 in self._walk(num, label, generator):
            yield (x_t, x0) if self.latents is None else (self.latents.decode(x_t), self.latents.decode(x0))

    def inpaint(
        self,
        x: Tensor,
        mask: Tensor,
        label: Tensor | None = None,
        generator: Generators = None,
        num_resamples: int = 10,
        jump_length: int = 1,
    ) -> Tensor:
        """Fill holes in images by :func:`lit_generative.diffusion.inpainting.inpaint`; the rest as in :meth:`sample`.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            mask: True where ``x`` is known, ``(N, 1, H, W)`` or ``(N, C, H, W)`` bool.
            label: Classes, ``(N,)``.
            generator: Source of all noise.
            num_resamples: How often each level is reached that the walk goes up from; 1 never goes up.
            jump_length: How many levels it goes up.

        Returns:
            ``(N, C, H, W)``, float32, equal to ``x`` where that is known.

        Raises:
            ValueError: If the model works on latents, or is shown images beside the noisy one.
        """
        check_inpainting(self.latents, self.condition)
        x, mask = x.to(self.device), mask.to(self.device)
        denoise = self.denoiser(self.labels_for(len(x), label, generator))
        noise = functools.partial(randn, x.shape, generator, self.device)
        with evaluating(self.network), torch.no_grad():
            return self._last(inpaint(denoise, self.sampler, x, mask, noise, num_resamples, jump_length))

    def super_resolve(self, low: Tensor, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Enlarge images ``(N, C, h, w)`` in ``[-1, 1]`` to ``(N, C, H, W)``; the rest as in :meth:`sample`.

        Raises:
            ValueError: If the model was not trained for it, or for images of another size.
        """
        condition = super_resolution_of(self.condition)
        condition.check_small(low, self.network.sample_shape)  # type: ignore[arg-type]
        return self._last(self._walk(len(low), label, generator, condition.enlarge(low.to(self.device))))

    def samples_of(self, x: Tensor, label: Tensor | None = None, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """What the model is shown of images ``(N, C, H, W)``, and samples made of that; the rest as in :meth:`sample`.

        Raises:
            ValueError: If it has no condition.
        """
        if self.condition is None:
            raise ValueError("DDPM: samples_of needs a model with a condition. Call sample().")
        shown = self.condition.of(x.to(self.device))
        return shown, self._last(self._walk(len(x), label, generator, shown))

    def denoiser(self, y: Tensor | None = None, condition: Tensor | None = None) -> Denoiser:
        """The network as a sampler sees it.

        Args:
            y: Labels, ``(N,)``, if there are classes.
            condition: What the network sees beside ``x_t``, ``(N, C', H, W)``.
        """
        model = (self.network, self.schedule, self.parameterization)
        return Denoiser(*model, y, self.clip_samples, self.sampler.guidance, condition, self.self_conditioning)

    def _last(self, walk: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        x, _ = deque(walk, maxlen=1).pop()  # no other step is kept
        return x if self.latents is None else self.latents.decode(x)

    def _walk(
        self, num: int, label: Tensor | None, generator: Generators, condition: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        check_shown(self.condition, condition)
        shape = (num, *self.network.sample_shape)  # type: ignore[misc]
        x_t = self.schedule.initial_scale * randn(shape, generator, self.device)
        denoise = self.denoiser(self.labels_for(num, label, generator), condition)
        with evaluating(self.network):
            walk = self.sampler.trajectory(denoise, x_t, lambda: randn(shape, generator, self.device))
            while True:
                with torch.no_grad():  # not around the yield: the caller's own gradients are not ours to switch off
                    step = next(walk, None)
                if step is None:
                    return
                yield step
