"""Options that choose how a diffusion model draws: its sampler, steps and guidance are no part of what it learned."""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_generative.diffusion.samplers import Sampler

SAMPLERS = ("DDPMSampler", "DDIMSampler", "DPMSolver2M", "HeunSampler", "EulerSampler")
OPTIONS = ("sampler", "num_steps", "guidance_scale")


def add_arguments(parser: argparse.ArgumentParser, with_numbers: bool = True) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick.

    Args:
        parser: Gets them.
        with_numbers: Also ``--num_steps`` and ``--guidance_scale``, unless the parser has them.
    """
    add = parser.add_argument
    add("--sampler", choices=SAMPLERS, help="of a diffusion model, at the same spacing (default: the run's)")
    if with_numbers:
        add("--num_steps", type=int, help="steps of a diffusion model's sampler (default: the run's)")
        add("--guidance_scale", type=float, help="of a diffusion model; 1 is no guidance (default: the run's)")


def choose(args: argparse.Namespace, module: Any) -> None:
    """Give the model the sampler that the options ask for, if they do; one that draws from texts asks for itself.

    Raises:
        ValueError: If the model has no sampler, or they do not fit it.
    """
    from lit_generative.types import SupportsPrompts

    options = {name: getattr(args, name) for name in OPTIONS}
    given = [name for name, value in options.items() if value is not None]
    if not given or (isinstance(module, SupportsPrompts) and given[0] != "sampler"):
        return
    from lit_generative.diffusion.checks import check_model
    from lit_generative.diffusion.module import DDPM

    if not isinstance(module, DDPM):
        raise ValueError(
            f"--{given[0]}: the {type(module).__name__} in {args.ckpt_path} has no sampler to choose. Leave it out."
        )
    module.sampler = _changed(module.sampler, **options)
    check_model(module)


def _changed(old: Sampler, sampler: str | None, num_steps: int | None, guidance_scale: float | None) -> Sampler:
    """Another sampler, or the same with other numbers."""
    from lit_generative.diffusion import guidance, samplers, solvers

    guide: Any = old.guidance
    if guidance_scale is not None and guide is None:
        guide = guidance.ClassifierFree(guidance_scale)
    elif guidance_scale is not None:
        guide = type(guide)(**{**guide._recipe["init_args"], "scale": guidance_scale})
    steps = old.num_steps if num_steps is None else num_steps
    if sampler is not None and sampler != type(old).__name__:
        cls: Any = getattr(samplers, sampler, None) or getattr(solvers, sampler)
        made: Sampler = cls(num_steps=steps, spacing=old.spacing, guidance=guide)
        return made
    # A scheduler of diffusers is a part that its constructor takes apart; others are built anew, and so checked.
    if not hasattr(old, "scheduler_class"):
        return type(old)(**{**old._recipe["init_args"], "num_steps": steps, "guidance": guide})
    same = copy.copy(old)
    same.num_steps, same.guidance = steps, guide
    same._recipe = {**old._recipe, "init_args": {**old._recipe["init_args"], "num_steps": steps, "guidance": guide}}
    return same
