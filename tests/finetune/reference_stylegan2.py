"""StyleGAN2 written down anew from its paper, with the names of rosinality's state dict, for comparison.

Each example has its own modulated weights (eq. 1 and 3), and filters are zeros put between, padding and a convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])
KERNEL = TAPS[:, None] * TAPS / 64
MULTIPLIER = 0.01


def random_generator(widths: list[int], style_dim: int = 6, layers: int = 2, channels: int = 3, seed: int = 0) -> State:
    """A state dict of a generator with ``widths`` at 4x4, 8x8 and so on."""
    torch.manual_seed(seed)
    state = {"input.input": torch.randn(1, widths[0], 4, 4)}
    for i in range(layers):
        state[f"style.{i + 1}.weight"] = torch.randn(style_dim, style_dim) / MULTIPLIER
        state[f"style.{i + 1}.bias"] = torch.randn(style_dim) / MULTIPLIER / 2

    def modulated(name: str, before: int, after: int, size: int) -> None:
        state[f"{name}.conv.weight"] = torch.randn(1, after, before, size, size)
        state[f"{name}.conv.modulation.weight"] = torch.randn(before, style_dim)
        state[f"{name}.conv.modulation.bias"] = 1 + torch.randn(before) / 4

    def styled(name: str, before: int, after: int, index: int) -> None:
        modulated(name, before, after, 3)
        state[f"{name}.noise.weight"] = torch.randn(1)
        state[f"{name}.activate.bias"] = torch.randn(after)
        side = 4 * 2 ** ((index + 1) // 2)
        state[f"noises.noise_{index}"] = torch.randn(1, 1, side, side)

    def colours(name: str, width: int) -> None:
        modulated(name, width, channels, 1)
        state[f"{name}.bias"] = torch.randn(1, channels, 1, 1)

    styled("conv1", widths[0], widths[0], 0)
    colours("to_rgb1", widths[0])
    for i in range(1, len(widths)):
        styled(f"convs.{2 * i - 2}", widths[i - 1], widths[i], 2 * i - 1)
        state[f"convs.{2 * i - 2}.conv.blur.kernel"] = KERNEL * 4
        styled(f"convs.{2 * i - 1}", widths[i], widths[i], 2 * i)
        colours(f"to_rgbs.{i - 1}", widths[i])
        state[f"to_rgbs.{i - 1}.upsample.kernel"] = KERNEL * 4
    return state


def random_discriminator(widths: list[int], channels: int = 3, seed: int = 0) -> State:
    """A state dict of a discriminator with ``widths`` from the image's size down to 4x4."""
    torch.manual_seed(seed)
    state: State = {}

    def conv(name: str, first: int, before: int, after: int, size: int, bias: bool = True) -> None:
        state[f"{name}.{first}.weight"] = torch.randn(after, before, size, size)
        if bias:
            state[f"{name}.{first + 1}.bias"] = torch.randn(after)

    conv("convs.0", 0, channels, widths[0], 1)
    for i in range(1, len(widths)):
        conv(f"convs.{i}.conv1", 0, widths[i - 1], widths[i - 1], 3)
        state[f"convs.{i}.conv2.0.kernel"] = KERNEL
        conv(f"convs.{i}.conv2", 1, widths[i - 1], widths[i], 3)
        state[f"convs.{i}.skip.0.kernel"] = KERNEL
        conv(f"convs.{i}.skip", 1, widths[i - 1], widths[i], 1, bias=False)
    last = widths[-1]
    conv("final_conv", 0, last + 1, last, 3)
    for i, size in enumerate((last, 1)):
        state[f"final_linear.{i}.weight"] = torch.randn(size, last * 16 if i == 0 else last)
        state[f"final_linear.{i}.bias"] = torch.randn(size)
    return state


def styles(state: State, z: Tensor) -> Tensor:
    """Styles ``(N, D)`` of latents ``(N, D)``."""
    w = z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    i = 1
    while f"style.{i}.weight" in state:
        w = activated(linear(w, state, f"style.{i}", MULTIPLIER))
        i += 1
    return w


def images(state: State, w: Tensor) -> Tensor:
    """Images of styles ``(N, D)``, the same in all layers, with the noise that the state holds."""
    x = styled(state["input.input"].expand(len(w), -1, -1, -1), w, state, "conv1", 0)
    image = colours(x, w, state, "to_rgb1")
    i = 0
    while f"to_rgbs.{i}.bias" in state:
        x = styled(x, w, state, f"convs.{2 * i}", 2 * i + 1, up=True)
        x = styled(x, w, state, f"convs.{2 * i + 1}", 2 * i + 2)
        image = filtered(zeros_between(image), KERNEL * 4, (2, 1)) + colours(x, w, state, f"to_rgbs.{i}")
        i += 1
    return image


def logits(state: State, x: Tensor) -> Tensor:
    """Logits ``(N,)`` of one group of images."""
    h = activated(convolved(x, state, "convs.0", 0))
    i = 1
    while f"convs.{i}.skip.1.weight" in state:
        name = f"convs.{i}"
        main = activated(convolved(h, state, f"{name}.conv1", 0, padding=1))
        main = activated(convolved(filtered(main, KERNEL, (2, 2)), state, f"{name}.conv2", 1, stride=2))
        h = (main + convolved(filtered(h, KERNEL, (1, 1)), state, f"{name}.skip", 1, stride=2)) / math.sqrt(2)
        i += 1
    deviation = (h.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
    h = torch.cat([h, deviation.expand(len(h), 1, 4, 4)], dim=1)
    h = activated(convolved(h, state, "final_conv", 0, padding=1))
    h = activated(linear(h.flatten(1), state, "final_linear.0"))
    return linear(h, state, "final_linear.1")[:, 0]


def activated(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def linear(x: Tensor, state: State, name: str, multiplier: float = 1.0) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return x @ (weight * multiplier / math.sqrt(weight.shape[1])).T + bias * multiplier


def convolved(x: Tensor, state: State, name: str, first: int, stride: int = 1, padding: int = 0) -> Tensor:
    weight, bias = state[f"{name}.{first}.weight"], state.get(f"{name}.{first + 1}.bias")
    return F.conv2d(x, weight / math.sqrt(weight[0].numel()), bias, stride, padding)


def zeros_between(x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    out[:, :, ::2, ::2] = x
    return out


def filtered(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    N, C, H, W = x.shape
    flat = F.pad(x.reshape(N * C, 1, H, W), (*padding, *padding))
    out = F.conv2d(flat, kernel.flip((0, 1))[None, None])
    return out.reshape(N, C, *out.shape[2:])


def modulated(x: Tensor, w: Tensor, state: State, name: str, demodulate: bool, up: bool = False) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    scale = linear(w, state, f"{name}.conv.modulation")
    own = weight / math.sqrt(weight[0, 0].numel()) * scale[:, None, :, None, None]
    if demodulate:
        own = own / (own.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if not up:
        return torch.cat([F.conv2d(x[n : n + 1], own[n], padding=own.shape[-1] // 2) for n in range(len(x))])
    out = torch.cat([F.conv_transpose2d(x[n : n + 1], own[n].transpose(0, 1), stride=2) for n in range(len(x))])
    return filtered(out, KERNEL * 4, (1, 1))


def styled(x: Tensor, w: Tensor, state: State, name: str, index: int, up: bool = False) -> Tensor:
    h = modulated(x, w, state, name, demodulate=True, up=up)
    h = h + state[f"{name}.noise.weight"] * state[f"noises.noise_{index}"]
    return activated(h + state[f"{name}.activate.bias"][:, None, None])


def colours(x: Tensor, w: Tensor, state: State, name: str) -> Tensor:
    return modulated(x, w, state, name, demodulate=False) + state[f"{name}.bias"]


# ---- the same weights with NVLabs' names


def nvlabs_generator(state: State, w_avg: Tensor) -> tuple[State, State]:
    """Parameters and buffers of ``state`` under the other names."""
    parameters: State = {"synthesis.b4.const": state["input.input"][0]}
    buffers: State = {"mapping.w_avg": w_avg}
    i = 0
    while f"style.{i + 1}.weight" in state:
        for kind in ("weight", "bias"):
            parameters[f"mapping.fc{i}.{kind}"] = state[f"style.{i + 1}.{kind}"]
        i += 1

    def affine(there: str, here: str) -> None:
        parameters[f"{here}.weight"] = state[f"{there}.conv.weight"][0]
        for kind in ("weight", "bias"):
            parameters[f"{here}.affine.{kind}"] = state[f"{there}.conv.modulation.{kind}"]

    def layer(there: str, here: str, index: int) -> None:
        affine(there, here)
        parameters[f"{here}.bias"] = state[f"{there}.activate.bias"]
        parameters[f"{here}.noise_strength"] = state[f"{there}.noise.weight"][0]
        buffers[f"{here}.noise_const"] = state[f"noises.noise_{index}"][0, 0]
        buffers[f"{here}.resample_filter"] = KERNEL

    layer("conv1", "synthesis.b4.conv1", 0)
    blocks = ["to_rgb1"] + [f"to_rgbs.{i}" for i in range(8) if f"to_rgbs.{i}.bias" in state]
    for i, name in enumerate(blocks):
        block = f"synthesis.b{4 * 2**i}"
        affine(name, f"{block}.torgb")
        parameters[f"{block}.torgb.bias"] = state[f"{name}.bias"].flatten()
        buffers[f"{block}.resample_filter"] = KERNEL
        if i > 0:
            layer(f"convs.{2 * i - 2}", f"{block}.conv0", 2 * i - 1)
            layer(f"convs.{2 * i - 1}", f"{block}.conv1", 2 * i)
    return parameters, buffers


def nvlabs_discriminator(state: State) -> tuple[State, State]:
    """Likewise of a discriminator."""
    parameters: State = {}
    buffers: State = {}
    num = sum(f"convs.{i}.skip.1.weight" in state for i in range(1, 9))
    pairs = {f"b{4 * 2**num}.fromrgb": ("convs.0", 0), "b4.conv": ("final_conv", 0)}
    for i in range(1, num + 1):
        block = f"b{8 * 2 ** (num - i)}"
        pairs |= {f"{block}.conv0": (f"convs.{i}.conv1", 0), f"{block}.conv1": (f"convs.{i}.conv2", 1)}
        pairs[f"{block}.skip"] = (f"convs.{i}.skip", 1)
        buffers[f"{block}.resample_filter"] = buffers[f"{block}.conv1.resample_filter"] = KERNEL
    for here, (there, first) in pairs.items():
        parameters[f"{here}.weight"] = state[f"{there}.{first}.weight"]
        if f"{there}.{first + 1}.bias" in state:
            parameters[f"{here}.bias"] = state[f"{there}.{first + 1}.bias"]
    for i, here in enumerate(("b4.fc", "b4.out")):
        for kind in ("weight", "bias"):
            parameters[f"{here}.{kind}"] = state[f"final_linear.{i}.{kind}"]
    return parameters, buffers
