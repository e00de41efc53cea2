"""Images that ``litgen sample`` draws from: with holes to be filled, or small ones to be enlarged."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_generative.data.image_files import decode_image, find_images, shown
from lit_generative.diffusion.checks import check_inpainting, super_resolution_of
from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.diffusion.module import DDPM
from lit_generative.tensor_ops import from_uint8
from lit_generative.training.module import GenerativeModule

Draw = Callable[[range, Tensor | None, Sequence[torch.Generator]], Tensor]
"""From indices of samples, their labels ``(N,)`` and a generator for each to samples, ``(N, ...)``."""


def drawing(args: argparse.Namespace, module: GenerativeModule) -> Draw:
    """How ``litgen sample`` draws: from noise alone, or from images as ``--inpaint`` or ``--low_res`` say.

    Of several images, sample ``i`` is made of number ``i`` in the order of their names, and the first follows the last.

    Args:
        args: The options.
        module: What draws.

    Raises:
        ValueError: If the module cannot draw so, or an image or a mask does not fit it.
        FileNotFoundError: If an image or a mask is not there.
    """
    if args.inpaint is not None:
        return _inpainting(args, _ddpm("--inpaint", args, module))
    if args.low_res is not None:
        return _super_resolution(args, _ddpm("--low_res", args, module))
    if isinstance(module, DDPM) and isinstance(module.condition, SuperResolution):
        raise ValueError(f"--low_res is missing: the DDPM in {args.ckpt_path} enlarges images. Name small ones.")
    return lambda indices, labels, generators: module.sample(len(indices), labels, generators)


def _ddpm(option: str, args: argparse.Namespace, module: GenerativeModule) -> DDPM:
    if not isinstance(module, DDPM):
        raise ValueError(
            f"{option}: the {type(module).__name__} in {args.ckpt_path} draws from noise alone. Give the checkpoint of "
            "a DDPM."
        )
    return module


def _inpainting(args: argparse.Namespace, module: DDPM) -> Draw:
    check_inpainting(module.latents, module.condition)
    shape = tuple(module.network.sample_shape)  # type: ignore[arg-type]
    files = image_files("--inpaint", args.inpaint)[: args.num]
    x = read_images("--inpaint", files, shape)
    mask = read_masks(matching_masks(files, args.inpaint, args.mask), shape)

    def draw(indices: range, labels: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        turn = torch.tensor(indices)
        image, known = x[turn % len(x)], mask[turn % len(mask)]
        return module.inpaint(image, known, labels, generators, args.num_resamples, args.jump_length)

    return draw


def _super_resolution(args: argparse.Namespace, module: DDPM) -> Draw:
    shape = super_resolution_of(module.condition).small_shape(module.network.sample_shape)  # type: ignore[arg-type]
    low = read_images("--low_res", image_files("--low_res", args.low_res)[: args.num], shape)

    def draw(indices: range, labels: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        return module.super_resolve(low[torch.tensor(indices) % len(low)], labels, generators)

    return draw


def image_files(option: str, path: str) -> list[Path]:
    """The file itself, or all image files below a folder, in the order of their names.

    Args:
        option: Begins a message.
        path: File or folder.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If the folder holds no image.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{option}: there is no {path}. Name an image file, or a folder of such.")
    if not os.path.isdir(path):
        return [Path(path)]
    files = [Path(path) / name for name in find_images(path)]
    if not files:
        raise ValueError(f"{option}: {path} holds no image files. Name a folder of PNG, JPEG or the like.")
    return files


def read_images(option: str, files: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
    """Images of one size, as a model sees them.

    Args:
        option: Begins a message.
        files: At least one.
        shape: ``(C, H, W)`` of the model's images.

    Returns:
        ``(N, C, H, W)`` in ``[-1, 1]``, float32.

    Raises:
        ValueError: If a file is damaged or of another size, or the model takes none of 1 or 3 channels.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{option}: the model draws examples of shape {shape}, and image files hold 1 or 3 channels.")
    return from_uint8(torch.stack([_decode(option, file, shape) for file in files]))


def read_masks(files: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
    """Masks: white where an image is known, and black, or transparent, where it is to be filled.

    Args:
        files: At least one.
        shape: ``(C, H, W)`` of the model's images.

    Returns:
        True where known, ``(N, 1, H, W)`` bool.

    Raises:
        ValueError: If a file is damaged, of another size, or has other colours.
    """
    masks = []
    for file in files:
        mask = _decode("--mask", file, (1, *shape[1:]))
        if other := int(((mask > 0) & (mask < 255)).sum()):
            raise ValueError(
                f"--mask: {shown(str(file))} must be black and white, got {other} pixels of other colours. Write it "
                "without smoothing, as PNG."
            )
        masks.append(mask > 0)
    return torch.stack(masks)


def _decode(option: str, file: Path, shape: tuple[int, ...]) -> Tensor:
    channels, height, width = shape
    pixels = decode_image(str(file), None, channels, background="black" if option == "--mask" else "white")
    if pixels.shape[1:] != (height, width):
        raise ValueError(
            f"{option}: {shown(str(file))} must have {height} x {width} pixels (height x width), as the model wants, "
            f"got {pixels.shape[1]} x {pixels.shape[2]}. Bring it to that size."
        )
    return pixels


def matching_masks(files: Sequence[Path], images: str, path: str) -> list[Path]:
    """The mask of each image: the one file for all, or that of the image's name in a folder, whatever the ending.

    Args:
        files: The images.
        images: Their folder, or the one file; sub-folders are part of a name.
        path: File or folder of masks.

    Raises:
        FileNotFoundError: If an image has no mask.
        ValueError: If it has two.
    """
    masks = image_files("--mask", path)
    if not os.path.isdir(path):
        return masks
    by_name: dict[str, list[Path]] = {}
    for mask in masks:
        by_name.setdefault(_name(mask, path), []).append(mask)
    chosen = []
    for name in (_name(file, images) for file in files):
        found = by_name.get(name, [])
        if not found:
            raise FileNotFoundError(f"--mask: {path} holds no mask of the name {shown(name)}. Add it.")
        if len(found) > 1:
            raise ValueError(f"--mask: {path} holds {len(found)} masks of the name {shown(name)}. Keep one.")
        chosen.append(found[0])
    return chosen


def _name(file: Path, root: str) -> str:
    """Without ending; below a folder, with sub-folders."""
    return str((file.relative_to(root) if os.path.isdir(root) else Path(file.name)).with_suffix(""))
