"""``litgen sample``: draw from a checkpoint alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lit_generative.cli import prompts, samplers

if TYPE_CHECKING:
    from torch import Tensor

    from lit_generative.cli.inputs import Draw
    from lit_generative.training.module import GenerativeModule
    from lit_generative.types import PromptOptions

FORMATS = ("png", "grid", "npz", "gif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument
    add("--ckpt_path", required=True, help="a checkpoint, or the folder of a run, as in runs/ddpm_digits")
    add("--num", type=positive, help="how many samples (default: 64, or one of each prompt)")
    add("--seed", type=int, default=0, help="same seed, same samples, whatever the batch size (default: 0)")
    add("--out", default="samples", help="folder to write to (default: samples)")
    add(
        "--format",
        choices=FORMATS,
        nargs="+",
        default=["grid"],
        help="png: a file a sample; grid: one picture; npz: `images` uint8 (N, H, W, C), or `points` float32 (N, 2); "
        "gif: a grid's way from noise to data (diffusion) (default: grid)",
    )
    add("--label", type=int, nargs="+", help="class of the samples; several are taken in turn (default: at random)")
    add("--columns", type=positive, help="samples in a row of the grid (default: a square)")
    add_inputs_arguments(parser)
    prompts.add_arguments(parser)
    samplers.add_arguments(parser, with_numbers=False)
    add_weights_arguments(parser)
    add("--batch_size", type=positive, default=64, help="samples drawn at once (default: 64)")
    add("--device", default="auto", help="cpu, cuda, mps, or auto (default: auto)")
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="further packages whose classes may be built")


def add_inputs_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the images to draw from."""
    add = parser.add_argument
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--inpaint",
        metavar="IMAGES",
        help="fill holes (diffusion): an image of the model's size, or a folder of such; several are taken in turn",
    )
    inputs.add_argument(
        "--low_res",
        metavar="IMAGES",
        help="enlarge (diffusion trained for super-resolution): a small image, or a folder of such; several are taken "
        "in turn",
    )
    add(
        "--mask",
        help="of --inpaint: white pixels are kept, black or transparent ones filled; one image for all, or a folder "
        "with one of the same name for each",
    )
    add("--num_resamples", type=positive, default=10, help="of --inpaint: visits to a noise level (default: 10)")
    add("--jump_length", type=positive, default=1, help="of --inpaint: levels between two visits (default: 1)")


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which of a checkpoint's weights to draw with."""
    add = parser.add_argument
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw with the averaged weights (default: if the checkpoint has them)",
    )
    add("--ema_profile", metavar="NAME", help="which averaged weights, of a run with several (default: the first)")


def chosen_weights(args: argparse.Namespace) -> bool | str | None:
    """What :func:`~lit_generative.loading.load_module` is told of the options of :func:`add_weights_arguments`.

    Raises:
        ValueError: If they contradict each other.
    """
    if args.ema is False and args.ema_profile is not None:
        raise ValueError(f"--no-ema and --ema_profile {args.ema_profile} contradict each other. Leave one of them out.")
    ema: bool | str | None = args.ema if args.ema_profile is None else args.ema_profile
    return ema


def run(args: argparse.Namespace) -> list[Path]:
    """Draw and write.

    Returns:
        The files written (of ``png``, the folder).

    Raises:
        ValueError: If the checkpoint or an option does not fit.
        FileNotFoundError: If there is no such checkpoint.
    """
    _check_inputs(args)
    from lit_generative.cli.inputs import drawing
    from lit_generative.loading import load_module

    ema = chosen_weights(args)
    module = load_module(args.ckpt_path, ema=ema, device=args.device, trust=args.trust)
    samplers.choose(args, module)
    if args.num is None:
        args.num = len(args.prompt) if args.prompt else 64
    if (options := prompts.check(args, module)) is not None:
        return _draw_prompts(module, args, options)
    labels, draw = _labels(args, module), drawing(args, module)
    out = Path(args.out)
    written = []
    formats = list(dict.fromkeys(args.format))
    if "gif" in formats:
        written.append(_write_gif(module, labels, args, out / "samples.gif"))
        formats.remove("gif")
    if formats:
        import torch

        samples = torch.cat(list(_batches(draw, labels, args)))
        written += [_WRITERS[name](samples, out, args.columns) for name in formats]
    return written


def _draw_prompts(module: GenerativeModule, args: argparse.Namespace, options: PromptOptions) -> list[Path]:
    import torch

    drawn = list(prompts.draw(module, args, options))
    if isinstance(drawn[0], list):
        return [prompts.write_texts([text for part in drawn for text in part], args)]
    samples = torch.cat([part.cpu() for part in drawn])  # type: ignore[union-attr]
    return [_WRITERS[name](samples, Path(args.out), args.columns) for name in dict.fromkeys(args.format)]


def _check_inputs(args: argparse.Namespace) -> None:
    if args.inpaint is not None and args.mask is None:
        raise ValueError("--mask is missing: name an image that is white where --inpaint keeps pixels, and else black.")
    if args.mask is not None and args.inpaint is None:
        raise ValueError("--mask: there is nothing to fill. Name the images with --inpaint.")
    if args.prompt and (args.label or args.inpaint is not None or args.low_res is not None):
        raise ValueError("--prompt: --label, --inpaint and --low_res are of other models. Leave them out.")
    if "gif" in args.format and (args.prompt or args.inpaint is not None or args.low_res is not None):
        raise ValueError("--format gif: shows the way of samples from noise alone. Take png, grid or npz.")


def _batches(draw: Draw, labels: Tensor | None, args: argparse.Namespace) -> Iterator[Tensor]:
    from lit_generative.tensor_ops import sample_generators

    for start in range(0, args.num, args.batch_size):
        num = min(args.batch_size, args.num - start)
        part = None if labels is None else labels[start : start + num]
        yield draw(range(start, start + num), part, sample_generators(args.seed, num, start)).cpu()


def _labels(args: argparse.Namespace, module: GenerativeModule) -> Tensor | None:
    if args.label is None:
        return None
    import torch

    if module.num_classes is None:
        raise ValueError(f"--label: the {type(module).__name__} in {args.ckpt_path} has no classes. Leave --label out.")
    if bad := [y for y in args.label if not 0 <= y < module.num_classes]:
        raise ValueError(f"--label: the model has classes 0..{module.num_classes - 1}, got {bad[0]}.")
    return torch.tensor(args.label)[torch.arange(args.num) % len(args.label)]


def _write_png(samples: Tensor, out: Path, _: int | None) -> Path:
    from lit_generative.pictures import save_png
    from lit_generative.tensor_ops import to_uint8

    if samples.ndim != 4:
        raise ValueError("--format png: the model gives points, not images. Use --format npz or grid.")
    for index, image in enumerate(to_uint8(samples)):
        save_png(image.permute(1, 2, 0), out / f"{index:06d}.png")
    return out


def _write_grid(samples: Tensor, out: Path, columns: int | None) -> Path:
    from lit_generative.pictures import grid, save_png

    return save_png(grid(samples, columns), out / "grid.png")


def _write_npz(samples: Tensor, out: Path, _: int | None) -> Path:
    import numpy as np

    from lit_generative.tensor_ops import to_uint8

    out.mkdir(parents=True, exist_ok=True)
    path = out / "samples.npz"
    if samples.ndim == 4:
        np.savez_compressed(path, images=to_uint8(samples).permute(0, 2, 3, 1).numpy())
    else:
        np.savez_compressed(path, points=samples.float().numpy())
    return path


def _write_gif(module: GenerativeModule, labels: Tensor | None, args: argparse.Namespace, path: Path) -> Path:
    from lit_generative.pictures import grid, save_gif
    from lit_generative.tensor_ops import sample_generators
    from lit_generative.types import SupportsTrajectory

    if not isinstance(module, SupportsTrajectory):
        raise ValueError(f"--format gif: a {type(module).__name__} draws in one step, so there is no way to show.")
    generators = sample_generators(args.seed, args.num)
    frames = [grid(x_t, args.columns) for x_t, _ in module.trajectory(args.num, labels, generators)]
    every = max(1, len(frames) // 50)
    return save_gif([*frames[:-1:every], frames[-1]], path)


def positive(text: str) -> int:
    """A whole number of at least 1, for an option that counts.

    Raises:
        argparse.ArgumentTypeError: If it is below.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_WRITERS: dict[str, Callable[[Tensor, Path, int | None], Path]] = {
    "png": _write_png,
    "grid": _write_grid,
    "npz": _write_npz,
}
