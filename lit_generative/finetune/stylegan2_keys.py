"""Names and forms of StyleGAN2's weights in other libraries' files, and here.

Assumed of both, beside the names: 3x3 kernels that go before a doubling of the size are stored as a transposed
convolution takes them, unflipped; equalized weights are stored unscaled, those of the mapping network divided by its
learning rate multiplier of 0.01; a style scales by ``affine(w)`` whose bias holds the one. Both lists of
names are written down from what is publicly known of the files: no code of either was read for it, and no published
file was at hand. A file of other names or shapes is refused, not guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


class Entry(NamedTuple):
    """One weight: where it is there, what it is called here, and how it changes."""

    theirs: str
    ours: str
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor


class Renaming(NamedTuple):
    """How one of the networks reads in a file."""

    entries: list[Entry]
    filters: str
    """How names of the low-pass filters end, which are no weights."""


def renamed(who: str, weights: Weights, renaming: Renaming) -> dict[str, Tensor]:
    """Weights under our names, float32.

    Args:
        who: The network in its file, for messages.
        weights: As they are there.
        renaming: How they read.

    Raises:
        ValueError: If a weight is missing or too many, or a filter is not ``[1, 3, 3, 1]``.
    """
    rest = dict(weights)
    for name in [name for name in rest if name.endswith(renaming.filters)]:
        _check_filter(who, name, rest.pop(name))
    missing = [entry.theirs for entry in renaming.entries if entry.theirs not in rest]
    unknown = sorted(set(rest) - {entry.theirs for entry in renaming.entries})
    if missing or unknown:
        raise ValueError(
            f"{who}: its weights are not those of StyleGAN2's published configuration (generator with skip "
            f"connections, residual discriminator, no classes): {len(missing)} are missing, {len(unknown)} unknown, "
            f"{(missing + unknown)[0]} among them."
        )
    return {entry.ours: entry.change(rest[entry.theirs]).float().contiguous() for entry in renaming.entries}


def _check_filter(who: str, name: str, kernel: Tensor) -> None:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    expected = taps[:, None] * taps / 64
    if kernel.shape != (4, 4) or not torch.allclose(kernel.float() / kernel.float().sum(), expected):
        raise ValueError(f"{who}: the low-pass filter {name} must be [1, 3, 3, 1] in both directions, got another.")


def _linear(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}.weight")
    yield Entry(f"{theirs}.bias", f"{ours}.bias")


def count(weights: Weights, pattern: str, start: int = 0) -> int:
    """How many names ``pattern.format(i)`` there are, from ``start`` on without a gap."""
    number = start
    while pattern.format(number) in weights:
        number += 1
    return number - start


# ---- rosinality


def rosinality_generator(weights: Weights, num_sizes: int, num_layers: int) -> Renaming:
    """Of a generator with ``num_sizes`` sizes from 4x4 on and ``num_layers`` mapping layers."""
    entries = [Entry("input.input", "base", lambda t: t[0])]
    for i in range(num_layers):
        entries += _linear(f"style.{i + 1}", f"mapping.layers.{i}")
    for k in range(2 * num_sizes - 1):
        there, here = "conv1" if k == 0 else f"convs.{k - 1}", f"convs.{k}"
        entries += _rosinality_modulated(there, here)
        entries += [
            Entry(f"{there}.noise.weight", f"{here}.noise_strength"),
            Entry(f"{there}.activate.bias", f"{here}.bias"),
        ]
        if f"noises.noise_{k}" in weights:  # early files have none
            entries.append(Entry(f"noises.noise_{k}", f"{here}.noise", lambda t: t[0, 0]))
    for i in range(num_sizes):
        there, here = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}", f"to_colours.{i}"
        entries += _rosinality_modulated(there, here)
        entries.append(Entry(f"{there}.bias", f"{here}.bias", lambda t: t.flatten()))
    return Renaming(entries, ".kernel")


def _rosinality_modulated(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.conv.weight", f"{ours}.conv.weight", lambda t: t[0])
    yield from _linear(f"{theirs}.conv.modulation", f"{ours}.conv.scale")


def rosinality_discriminator(num_sizes: int) -> Renaming:
    """Of a discriminator with ``num_sizes`` sizes down to 4x4."""

    def layer(theirs: str, ours: str, first: int = 0) -> list[Entry]:
        return [
            Entry(f"{theirs}.{first}.weight", f"{ours}.weight"),
            Entry(f"{theirs}.{first + 1}.bias", f"{ours}.bias"),
        ]

    entries = [*layer("convs.0", "from_colours"), *layer("final_conv", "conv")]
    for i in range(num_sizes - 1):
        there, here = f"convs.{i + 1}", f"blocks.{i}"
        entries += layer(f"{there}.conv1", f"{here}.conv1")
        entries += layer(f"{there}.conv2", f"{here}.conv2", first=1)  # after the filter
        entries.append(Entry(f"{there}.skip.1.weight", f"{here}.shortcut.weight"))
    entries += [*_linear("final_linear.0", "linear"), *_linear("final_linear.1", "head")]
    return Renaming(entries, ".kernel")


# ---- NVLabs, PyTorch


def nvlabs_generator(num_sizes: int, num_layers: int) -> Renaming:
    """Of a generator with ``num_sizes`` sizes from 4x4 on and ``num_layers`` mapping layers."""
    entries = [Entry("mapping.w_avg", "w_avg"), Entry("synthesis.b4.const", "base")]
    for i in range(num_layers):
        entries += _linear(f"mapping.fc{i}", f"mapping.layers.{i}")
    for i in range(num_sizes):
        block = f"synthesis.b{4 * 2**i}"
        if i > 0:
            entries += _nvlabs_styled(f"{block}.conv0", f"convs.{2 * i - 1}")
        entries += _nvlabs_styled(f"{block}.conv1", f"convs.{2 * i}")
        entries += _nvlabs_modulated(f"{block}.torgb", f"to_colours.{i}")
    return Renaming(entries, "resample_filter")


def _nvlabs_styled(theirs: str, ours: str) -> Iterator[Entry]:
    yield from _nvlabs_modulated(theirs, ours)
    yield Entry(f"{theirs}.noise_const", f"{ours}.noise")
    yield Entry(f"{theirs}.noise_strength", f"{ours}.noise_strength", lambda t: t.reshape(1))


def _nvlabs_modulated(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}.conv.weight")
    yield Entry(f"{theirs}.bias", f"{ours}.bias")
    yield from _linear(f"{theirs}.affine", f"{ours}.conv.scale")


def nvlabs_discriminator(num_sizes: int) -> Renaming:
    """Of a discriminator with ``num_sizes`` sizes down to 4x4."""
    entries = list(_linear(f"b{4 * 2 ** (num_sizes - 1)}.fromrgb", "from_colours"))
    for i in range(num_sizes - 1):
        block = f"b{4 * 2 ** (num_sizes - 1 - i)}"
        entries += _linear(f"{block}.conv0", f"blocks.{i}.conv1")
        entries += _linear(f"{block}.conv1", f"blocks.{i}.conv2")
        entries.append(Entry(f"{block}.skip.weight", f"blocks.{i}.shortcut.weight"))
    entries += [*_linear("b4.conv", "conv"), *_linear("b4.fc", "linear"), *_linear("b4.out", "head")]
    return Renaming(entries, "resample_filter")
