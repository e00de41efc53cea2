"""What the rooms of the house know of each other: batches, and what a module can be asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from lit_generative.tensor_ops import Generators


class Batch(TypedDict):
    """What every data module yields, on the module's device."""

    image: Tensor
    """Images ``(N, C, H, W)`` in ``[-1, 1]``, or 2-D points ``(N, 2)``; float32."""
    label: Tensor
    """Class labels ``(N,)``, int64; zero where the data has no classes."""


@runtime_checkable
class SupportsSampling(Protocol):
    """A module that draws from its model."""

    num_classes: int | None
    """How many classes a label may name; None for an unconditional model."""

    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw ``num`` samples: ``(N, C, H, W)`` in ``[-1, 1]``, or points ``(N, 2)``."""
        ...


class PromptOptions(NamedTuple):
    """How to draw from prompts; None leaves it to the model."""

    negative: str | None = None
    """What pictures shall not show."""
    guidance_scale: float | None = None
    """How much more the prompt counts; 1 is no guidance."""
    num_steps: int | None = None
    """Steps of the sampler."""
    max_new_tokens: int | None = None
    """Length of a continuation."""
    temperature: float | None = None
    """Of the draws of tokens; 0 takes the most likely one."""


MODELS_OWN = PromptOptions()
"""Leaves everything to the model."""


@runtime_checkable
class SupportsPrompts(Protocol):
    """A module that draws from texts: pictures of them, or how they go on."""

    prompt_options: tuple[str, ...]
    """Which of :class:`PromptOptions` it has a use for."""

    def sample_prompts(
        self, prompts: Sequence[str], options: PromptOptions = MODELS_OWN, generator: Generators = None
    ) -> Tensor | list[str]:
        """One picture of each prompt, ``(N, C, H, W)`` in ``[-1, 1]``, or its continuation.

        Args:
            prompts: ``N`` texts.
            options: How to draw.
            generator: One for all, or one for each.
        """
        ...


@runtime_checkable
class SupportsExport(Protocol):
    """A module that can be written in forms of other libraries."""

    @property
    def export_formats(self) -> tuple[str, ...]:
        """Names of the forms, as in ``("diffusers-lora", "merged")``."""
        ...

    def export(self, format: str, folder: Path) -> str:
        """Write into an empty folder in one of the :attr:`export_formats`; tells how to load it, in Python."""
        ...


@runtime_checkable
class SupportsExamples(Protocol):
    """A module that may be shown images, and then draws from them alone: :meth:`SupportsSampling.sample` refuses."""

    condition: Any
    """What is made of an image, to be shown; None if nothing is."""

    def samples_of(self, x: Tensor, label: Tensor | None = None, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """What is shown of ``x``, ``(N, C, H, W)``, ``(N, C', H, W)``, and samples made of it, shaped like ``x``."""
        ...


def draws_from_images(module: object) -> bool:
    """Whether a module is shown images, and draws from them alone."""
    return isinstance(module, SupportsExamples) and module.condition is not None


@runtime_checkable
class SupportsReconstruction(Protocol):
    """A module that encodes and decodes images."""

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Give ``x``, ``(N, C, H, W)`` in ``[-1, 1]``, back through the model; ``y`` are its labels, ``(N,)``."""
        ...


@runtime_checkable
class SupportsLikelihood(Protocol):
    """A module with latents, vectors or maps, whose likelihood can be estimated by importance sampling."""

    num_classes: int | None
    """How many classes the labels name; None if it takes none."""

    @property
    def is_discrete(self) -> bool:
        """Whether the likelihood is one of 8-bit pixels."""
        ...

    def log_importance_weights(self, x: Tensor, num_draws: int, y: Tensor | None = None) -> Tensor:
        """``log p(x, z) / q(z|x)`` of draws from the posterior, nats, ``(num_draws, N)``."""
        ...

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of ``q(z|x)``, each ``(N, D)`` or ``(N, D, h, w)``."""
        ...

    def kl_by_dimension(self, mean: Tensor, logvar: Tensor) -> Tensor | None:
        """KL divergence of a posterior from the prior, nats, shaped like ``mean``; None without a closed form."""
        ...


@runtime_checkable
class SupportsLatents(Protocol):
    """A module that goes from images to codes and back."""

    num_classes: int | None
    """How many classes the labels name; None if it takes none."""

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the code of ``x``, each ``(N, D)`` or ``(N, D, h, w)``."""
        ...

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The one code that stands for ``x``, as :meth:`decode` takes it."""
        ...

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images ``(N, C, H, W)`` in ``[-1, 1]`` of codes ``(N, D)`` or ``(N, D, h, w)``."""
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """A trained autoencoder, on whose latents another model can be trained."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent: ``(D,)`` or ``(D, h, w)``."""
        ...

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents of ``x``, each ``(N, *latent_shape)``."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in ``[-1, 1]`` of latents ``(N, *latent_shape)``."""
        ...


@runtime_checkable
class SupportsKLSchedule(Protocol):
    """A module whose KL term may change its weight in the course of training."""

    kl_weight: float
    """Weight of the KL term in training; what it is when training starts is the full one."""


@runtime_checkable
class SupportsCapacity(Protocol):
    """A module whose KL term may change its aim in the course of training."""

    capacity: float | None
    """Nats that the KL term is to have; None leaves it to the objective."""

    @property
    def has_capacity(self) -> bool:
        """Whether the objective aims at it."""


@runtime_checkable
class SupportsTrajectory(Protocol):
    """A module that samples step by step."""

    def trajectory(
        self, num: int, label: Tensor | None = None, generator: Generators = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the noisy batch and the model's guess of the clean one, from noise to data."""
        ...


@runtime_checkable
class SupportsAveraging(Protocol):
    """A module that names the sub-modules its samples come from: what an average of the weights must hold."""

    @property
    def sampling_modules(self) -> list[str]:
        """Attribute names, as in ``["generator"]``."""
        ...


@runtime_checkable
class DescribesData(Protocol):
    """A data module that says what it yields, so that a mismatch is found before training."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one example: ``(C, H, W)``, or ``(2,)``."""
        ...

    @property
    def num_classes(self) -> int | None:
        """How many classes the labels name; None if there are none."""
        ...


Split = Literal["train", "val", "test"]


@runtime_checkable
class SupportsReference(Protocol):
    """A data module whose examples generated ones can be scored against."""

    def num_examples(self, split: Split) -> int:
        """How many there are."""
        ...

    def examples(self, split: Split, indices: Tensor) -> Tensor:
        """Those at ``indices``, ``(N,)`` int64: uint8 images ``(N, C, H, W)`` as training sees them, unaugmented."""
        ...


@runtime_checkable
class SupportsLabels(Protocol):
    """A data module whose examples have class labels."""

    def labels(self, split: Split, indices: Tensor) -> Tensor:
        """Those of the examples at ``indices``, ``(N,)`` int64: ``(N,)`` int64."""
        ...


@runtime_checkable
class DescribesSampling(Protocol):
    """A module that says how it draws, for the record of a score."""

    def sampling_settings(self) -> dict[str, Any]:
        """Plain data, as in ``{"sampler": ..., "guidance": 2.0}``; empty if there is no choice."""
        ...


@runtime_checkable
class DescribesModes(Protocol):
    """A data module whose distribution is a mixture of round Gaussians, so that its modes can be counted."""

    centers: Tensor
    """Means, ``(K, 2)``."""
    std: float
    """Standard deviation along each axis."""


class DensityEstimator(ABC):
    """A way to say how likely data is under a model, chosen beside the callback that asks."""

    def check(self, module: Any) -> None:  # noqa: B027
        """Refuse a model that it can say nothing of, before training; takes any, unless a leaf says otherwise.

        Raises:
            ValueError: If the model does not fit.
        """

    @abstractmethod
    def estimate(self, module: Any, x: Tensor, y: Tensor | None, generator: Generators) -> dict[str, Tensor]:
        """Figures of each example by name, each ``(N,)``.

        Args:
            module: The model.
            x: Examples, ``(N, ...)``.
            y: Labels, ``(N,)``, if the model has classes.
            generator: One for each example, the source of all randomness.
        """
