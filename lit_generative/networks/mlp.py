"""Perceptrons: for 2-D points in all three families, and for small images in a VAE."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lit_generative.networks.checks import check_counts, check_label, check_shape, with_label
from lit_generative.networks.time_embedding import embeddable_time, sinusoidal_embedding
from lit_generative.recipe import Recorded

_TIME_FEATURES = 64
Activation = Literal["silu", "relu", "tanh"]
_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}


class MLPGenerator(Recorded, nn.Module):
    """Latents to 2-D points; ReLU between the layers, no activation at the end.

    Args:
        latent_dim: Length of ``z``.
        hidden_dim: Width of each hidden layer.
        num_layers: How many hidden layers.

    Raises:
        ValueError: If there is no hidden layer.
    """

    def __init__(self, latent_dim: int = 16, hidden_dim: int = 128, num_layers: int = 3) -> None:
        super().__init__()
        check_counts("MLPGenerator", latent_dim=latent_dim, hidden_dim=hidden_dim)
        self.latent_dim = latent_dim
        self.sample_shape = (2,)
        self.num_classes: int | None = None
        self.layers = _perceptron(latent_dim, hidden_dim, 2, num_layers, nn.ReLU())

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Turn latents ``(N, latent_dim)`` into points ``(N, 2)``.

        Raises:
            ValueError: If ``y`` is not None: this network knows no classes.
        """
        check_label(self, self.num_classes, y)
        points: Tensor = self.layers(z)
        return points


class MLPDiscriminator(Recorded, nn.Module):
    """Points to logits; leaky ReLU of slope 0.2 between the layers.

    Args:
        hidden_dim: Width of each hidden layer.
        num_layers: How many hidden layers.
        input_dim: Numbers in a point: 2, or 2 times what a pack holds.
        num_waves: Random Fourier features beside the point, without which a perceptron learns fine detail slowly
            (Tancik et al. 2020, arXiv:2006.10739); 0 for none.
        wave_number: Standard deviation of the waves' frequencies along each axis, in half periods per unit.

    Raises:
        ValueError: If there is no hidden layer, or the waves are fewer than none or not of positive frequency.
    """

    def __init__(
        self,
        hidden_dim: int = 128,
        num_layers: int = 3,
        input_dim: int = 2,
        num_waves: int = 0,
        wave_number: float = 2.0,
    ) -> None:
        super().__init__()
        check_counts("MLPDiscriminator", hidden_dim=hidden_dim)
        self.sample_shape = (input_dim,)
        self.num_classes: int | None = None
        self.waves: Tensor | None
        self.register_buffer("waves", _random_waves("MLPDiscriminator", input_dim, num_waves, wave_number))
        self.layers = _perceptron(input_dim + 2 * num_waves, hidden_dim, 1, num_layers, nn.LeakyReLU(0.2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Judge points ``(N, input_dim)`` by logits ``(N,)``, large for real.

        Raises:
            ValueError: If ``y`` is not None: this network knows no classes.
        """
        check_label(self, self.num_classes, y)
        logits: Tensor = self.layers(_with_waves(x, self.waves)).squeeze(dim=1)
        return logits


class MLPDenoiser(Recorded, nn.Module):
    """Noisy vectors, 2-D points if nothing else is said, and their times to a prediction; SiLU between the layers.

    Args:
        hidden_dim: Width of each hidden layer.
        num_layers: How many hidden layers.
        num_classes: How many classes a label may name; None for an unconditional network. The label ``num_classes``
            itself is the null class, which means "no label" to label dropout and classifier-free guidance.
        sample_shape: Of one example, ``(D,)``, as in ``(2,)``; larger shapes are flattened.
        extra_channels: Of what is shown beside ``x_t`` along the first axis: as many as it has for self-conditioning.
        learned_variance: Give twice the channels, the second half for the variance of the step down.
        num_waves: Random Fourier features beside the input, without which a perceptron learns fine detail slowly
            (Tancik et al. 2020, arXiv:2006.10739); 0 for none.
        wave_number: Standard deviation of the waves' frequencies along each axis, in half periods per unit.

    Raises:
        ValueError: If there is no hidden layer, or the waves are fewer than none or not of positive frequency.
    """

    def __init__(
        self,
        hidden_dim: int = 128,
        num_layers: int = 3,
        num_classes: int | None = None,
        sample_shape: tuple[int, ...] = (2,),
        extra_channels: int = 0,
        learned_variance: bool = False,
        num_waves: int = 0,
        wave_number: float = 2.0,
    ) -> None:
        super().__init__()
        check_counts("MLPDenoiser", hidden_dim=hidden_dim, num_classes=num_classes)
        self.sample_shape = tuple(sample_shape)
        self.num_classes = num_classes
        self.extra_channels = extra_channels
        self.learned_variance = learned_variance
        channels, *rest = sample_shape
        self.input_shape = (channels + extra_channels, *rest)
        self.output_shape = (channels * (2 if learned_variance else 1), *rest)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes + 1, _TIME_FEATURES)
        input_dim = math.prod(self.input_shape)
        self.waves: Tensor | None
        self.register_buffer("waves", _random_waves("MLPDenoiser", input_dim, num_waves, wave_number))
        input_dim += 2 * num_waves + _TIME_FEATURES * (1 if num_classes is None else 2)
        self.layers = _perceptron(input_dim, hidden_dim, math.prod(self.output_shape), num_layers, nn.SiLU())

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict what the parameterization asks for.

        Args:
            x_t: Noisy vectors and what is shown beside them, ``(N, D + extra_channels)``.
            t: int64 steps in ``[0, num_timesteps)``, or float times in ``[0, 1]``, ``(N,)``.
            y: Class labels in ``[0, num_classes]``, the last of which is the null class, ``(N,)`` int64; None if and
                only if the network is unconditional.

        Returns:
            The prediction, ``(N, D)``; with ``learned_variance`` ``(N, 2D)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or ``x_t`` has another shape.
        """
        check_label(self, self.num_classes, y)
        check_shape(self, x_t, self.input_shape)
        inputs = [_with_waves(x_t.flatten(start_dim=1), self.waves)]
        inputs.append(sinusoidal_embedding(embeddable_time(t), _TIME_FEATURES).to(x_t.dtype))
        if self.embedding is not None:
            inputs.append(self.embedding(y))
        prediction: Tensor = self.layers(torch.cat(inputs, dim=1))
        return prediction.unflatten(1, self.output_shape)


class MLPEncoder(Recorded, nn.Module):
    """Flattened examples to mean and log-variance of a Gaussian posterior.

    Args:
        sample_shape: Shape of one example, as in ``(1, 8, 8)`` or ``(2,)``.
        latent_dim: Length of the latent, D.
        hidden_dim: Width of each hidden layer.
        num_layers: How many hidden layers.
        activation: Between the layers; Burda et al. 2016 (arXiv:1509.00519) use tanh.
        num_classes: How many classes a label may name, which is joined to the input; None for no labels.

    Raises:
        ValueError: If there is no hidden layer, or the activation is unknown.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        latent_dim: int,
        hidden_dim: int = 128,
        num_layers: int = 2,
        activation: Activation = "silu",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_counts("MLPEncoder", latent_dim=latent_dim, hidden_dim=hidden_dim, num_classes=num_classes)
        self.sample_shape = tuple(sample_shape)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.layers = _perceptron(
            math.prod(sample_shape) + (num_classes or 0),
            hidden_dim,
            2 * latent_dim,
            num_layers,
            _activation(activation),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode examples ``(N, *sample_shape)``, with labels ``(N,)`` if there are classes.

        Returns:
            Mean and log-variance of the posterior, each ``(N, D)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        inputs = with_label(self, x.flatten(start_dim=1), self.num_classes, y)
        mean, logvar = self.layers(inputs).chunk(2, dim=1)
        return mean, logvar


class MLPDecoder(Recorded, nn.Module):
    """Latents to parameters of the likelihood; no activation at the end.

    Args:
        sample_shape: Shape of one example, as in ``(1, 8, 8)`` or ``(2,)``.
        latent_dim: Length of the latent, D.
        hidden_dim: Width of each hidden layer.
        num_layers: How many hidden layers.
        activation: Between the layers; Burda et al. 2016 (arXiv:1509.00519) use tanh.
        num_classes: How many classes a label may name, which is joined to the latent; None for no labels.
        parameters_per_value: How many numbers the likelihood needs for one value of an example.

    Raises:
        ValueError: If there is no hidden layer, or the activation is unknown.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        latent_dim: int,
        hidden_dim: int = 128,
        num_layers: int = 2,
        activation: Activation = "silu",
        num_classes: int | None = None,
        parameters_per_value: int = 1,
    ) -> None:
        super().__init__()
        check_counts("MLPDecoder", latent_dim=latent_dim, hidden_dim=hidden_dim, num_classes=num_classes)
        check_counts("MLPDecoder", parameters_per_value=parameters_per_value)
        self.sample_shape = tuple(sample_shape)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.output_shape = (parameters_per_value * sample_shape[0], *sample_shape[1:])
        self.layers = _perceptron(
            latent_dim + (num_classes or 0),
            hidden_dim,
            math.prod(self.output_shape),
            num_layers,
            _activation(activation),
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode latents ``(N, D)``, with labels ``(N,)`` if there are classes, into ``(N, *output_shape)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        parameters: Tensor = self.layers(with_label(self, z, self.num_classes, y))
        return parameters.reshape(-1, *self.output_shape)


def _random_waves(who: str, input_dim: int, num_waves: int, wave_number: float) -> Tensor | None:
    """Directions and frequencies of waves, ``(input_dim, num_waves)``; None for none."""
    if num_waves < 0 or wave_number <= 0:
        raise ValueError(
            f"{who}: num_waves must not be negative and wave_number positive, got {num_waves} and {wave_number}."
        )
    return torch.randn(input_dim, num_waves) * (math.pi * wave_number) if num_waves else None


def _with_waves(x: Tensor, waves: Tensor | None) -> Tensor:
    """Rows ``(N, D)`` with sines and cosines of each wave behind them."""
    if waves is None:
        return x
    phase = x @ waves.to(x.dtype)
    return torch.cat([x, phase.sin(), phase.cos()], dim=1)


def _activation(name: Activation) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: must be one of {list(_ACTIVATIONS)}, got {name!r}.")
    return _ACTIVATIONS[name]()


def _perceptron(input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, activation: nn.Module) -> nn.Module:
    """``num_layers`` hidden layers, each followed by ``activation``, and a linear layer at the end."""
    if num_layers < 1:
        raise ValueError(f"num_layers: a perceptron needs at least 1 hidden layer, got {num_layers}.")
    dims = [input_dim] + [hidden_dim] * num_layers
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(dims):
        layers += [nn.Linear(before, after), activation]
    return nn.Sequential(*layers, nn.Linear(hidden_dim, output_dim))
