"""``litgen ema``: choose the length of the weights' average after training, of a run with the PostHocEMA callback."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FOLDER = "ema_snapshots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument
    add("--run", required=True, help="folder of a run, as in runs/ddpm_digits")
    add("--sigma_rel", type=float, required=True, help="width of the average, of the training's length, as in 0.08")
    add("--step", type=int, help="the update at which the average ends (default: the last)")
    add("--out", metavar="FILE", help="checkpoint to write (default: posthoc_<sigma_rel>.ckpt beside the run's last)")


def run(args: argparse.Namespace) -> list[Path | str]:
    """Combine the run's snapshots and write a checkpoint that ``sample`` and ``test`` take.

    It holds the average as profile ``posthoc_<sigma_rel>`` and as its weights, so that a run without an EMA callback is
    evaluated with it, too. Optimizer states are left out: training goes on from the run's own checkpoint.

    Returns:
        The file written, and the error to expect.

    Raises:
        ValueError: If the run has no averages or an option does not fit.
        FileNotFoundError: If there is no run.
    """
    from lit_generative.callbacks.posthoc_ema import synthesize
    from lit_generative.loading import find_checkpoint
    from lit_generative.training.checkpoint_io import SafeCheckpointIO, load_checkpoint

    source = find_checkpoint(args.run)
    checkpoint = load_checkpoint(source)
    synthesis = synthesize(checkpoint, _snapshots_of(source, Path(args.run)), args.sigma_rel, args.step)
    profile = f"posthoc_{args.sigma_rel:.3f}"
    end = "" if args.step is None else f"_step_{args.step}"
    out = source.with_name(f"{profile}{end}.ckpt") if args.out is None else Path(args.out)
    if out.resolve() == source.resolve():
        raise ValueError(f"--out: {out} is the run's own checkpoint. Choose another file.")
    settings = {profile: {"sigma_rel": args.sigma_rel}}
    state: dict[str, Any] = {
        "images": synthesis.images,
        "weights": {profile: synthesis.weights},
        "settings": settings,
    }
    others = {key: value for key, value in checkpoint["callbacks"].items() if key not in ("EMA", "PostHocEMA")}
    checkpoint["callbacks"] = {**others, "EMA": state}
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **synthesis.weights}
    for name in ("optimizer_states", "lr_schedulers"):
        checkpoint.pop(name, None)
    SafeCheckpointIO().save_checkpoint(checkpoint, out)
    return [out, f"expected relative error of the average's profile: {synthesis.error:.2e}"]


def _snapshots_of(checkpoint: Path, run_folder: Path) -> Path:
    """The snapshots nearest above a checkpoint, within the folder asked for."""
    for parent in checkpoint.parents:
        if (parent / FOLDER).is_dir() or parent.resolve() == run_folder.resolve():
            return parent / FOLDER
    return checkpoint.parent / FOLDER
