"""``litgen export``: write a trained model in the form of another library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lit_generative.cli import samplers
from lit_generative.cli.sample import add_weights_arguments, chosen_weights

if TYPE_CHECKING:
    from lit_generative.training.module import GenerativeModule

FORMATS = {
    "diffusers": "a pipeline's folder, of a diffusion model, with adapters merged",
    "diffusers-lora": "the LoRA alone, of Stable Diffusion",
    "textual-inversion": "learned words alone",
    "peft": "adapters alone",
    "transformers": "a language model's folder",
    "merged": "the whole model with its adapters merged",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument
    add("--ckpt_path", required=True, help="a checkpoint, or the folder of a run, as in runs/ddpm_digits")
    told = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    add("--format", choices=FORMATS, default="diffusers", help=f"{told} (default: diffusers)")
    add("--out", required=True, help="folder to write to")
    add("--label", type=int, help="the class that a pipeline draws, of a model with classes")
    samplers.add_arguments(parser)
    add("--license", help="for the model card, as in apache-2.0 (default: the pretrained model's, if it has a card)")
    add_weights_arguments(parser)
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="further packages whose classes may be built")


def run(args: argparse.Namespace) -> list[Path | str]:
    """Load, convert and write.

    Returns:
        The folder written, and how to load it.

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
    from lit_generative.loading import find_checkpoint, load_module
    from lit_generative.training.checkpoint_io import load_checkpoint

    module = load_module(args.ckpt_path, ema=ema, trust=args.trust)
    if isinstance(module, DDPM) and args.format == "diffusers":
        samplers.choose(args, module)
        to_pipeline(module, args.label).save_pretrained(out, safe_serialization=True)
        return [out, how_to_call(module)]
    for name in ("label", *samplers.OPTIONS):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name}: is for the pipeline of a DDPM, not for a {type(module).__name__} as {args.format}. "
                "Leave it out."
            )
    told = _export(module, args, out)
    from lit_generative.finetune.model_card import read_origin, write_card

    write_card(out, read_origin(load_checkpoint(find_checkpoint(args.ckpt_path))), told, args.license)
    return [out, told]


def _export(module: GenerativeModule, args: argparse.Namespace, out: Path) -> str:
    from lit_generative.types import SupportsExport

    formats: tuple[str, ...] = ()
    if isinstance(module, SupportsExport):
        formats = module.export_formats
        if args.format in formats:
            return module.export(args.format, out)
    elif _has_adapters(module):
        from lit_generative.finetune.adapted_export import FORMATS as ADAPTED
        from lit_generative.finetune.adapted_export import export_adapted

        formats = ADAPTED
        if args.format in formats:
            return export_adapted(module, args.format, out)
    choices = f"It can be written as {', '.join(formats)}." if formats else "It has no such form."
    raise ValueError(
        f"--format {args.format}: {args.ckpt_path} holds a {type(module).__name__}, not a model of that form. {choices}"
    )


def _has_adapters(module: GenerativeModule) -> bool:
    """Whether a network has an adapter; PEFT, which takes seconds to import, is not asked."""
    return any(type(part).__name__ == "Adapted" for part in module.children())
