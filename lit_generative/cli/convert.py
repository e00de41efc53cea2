"""``litgen convert``: make a checkpoint from a file of another library."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("stylegan2-rosinality", "stylegan2-nvlabs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument
    add("--format", choices=FORMATS, required=True, help="whose file it is: a .pt of rosinality, a .pkl of NVLabs")
    add("--input", required=True, metavar="FILE", help="the file; code in it is never run")
    add("--out", required=True, metavar="FILE", help="checkpoint to write, as in stylegan2_ffhq.ckpt")


def run(args: argparse.Namespace) -> list[Path | str]:
    """Read, convert and write.

    Returns:
        The file written, and how to go on.

    Raises:
        ValueError: If the file is refused or holds another network, or ``--out`` exists already.
        FileNotFoundError: If there is no such file.
    """
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"--out: {out} exists already. Choose another name, or remove it.")
    from lit_generative.finetune.stylegan2_conversion import convert_stylegan2

    convert_stylegan2(args.input, out, args.format)
    return [out, f"Draw from it with litgen sample --ckpt_path {out}, or train on: configs/finetune/."]
