"""``litgen export``: write a trained model in the form of another library."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_generative.cli.sample import add_weights_arguments, chosen_weights

FORMATS = ("diffusers",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument
    add("--ckpt_path", required=True, help="a checkpoint, or the folder of a run, as in runs/ddpm_digits")
    add("--format", choices=FORMATS, default="diffusers", help="diffusers: a pipeline's folder, of a diffusion model")
    add("--out", required=True, help="folder to write to")
    add("--label", type=int, help="the class that the pipeline draws, of a model with classes")
    add_weights_arguments(parser)
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="further packages whose classes may be built")


def run(args: argparse.Namespace) -> list[Path | str]:
    """Load, convert and write.

    Returns:
        The folder written, and how to draw from it.

    Raises:
        ValueError: If the model cannot be written so, or the folder holds something already.
        FileNotFoundError: If there is no such checkpoint.
    """
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty. Choose another folder, or remove it.")
    ema = chosen_weights(args)
    from lit_generative.diffusion.module import DDPM
    from lit_generative.diffusion.pipelines import how_to_call, to_pipeline
    from lit_generative.loading import load_module

    module = load_module(args.ckpt_path, ema=ema, trust=args.trust)
    if not isinstance(module, DDPM):
        raise ValueError(
            f"--format diffusers: {args.ckpt_path} holds a {type(module).__name__}, not a diffusion model."
        )
    to_pipeline(module, args.label).save_pretrained(out, safe_serialization=True)
    return [out, how_to_call(module)]
