"""Options of ``litgen sample`` for models that draw from texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lit_generative.types import PromptOptions

OPTIONS = {
    "negative": "--negative_prompt",
    "guidance_scale": "--guidance_scale",
    "num_steps": "--num_steps",
    "max_new_tokens": "--max_new_tokens",
    "temperature": "--temperature",
}
"""Options by their field of :class:`~lit_generative.types.PromptOptions`."""
SAMPLING = ("guidance_scale", "num_steps")
"""What :mod:`lit_generative.cli.samplers` takes, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument_group("models that draw from texts").add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="what to draw, or how a text begins; several are taken in turn")
    add("--negative_prompt", dest="negative", metavar="TEXT", help="what pictures shall not show")
    add("--guidance_scale", type=float, help="how much more prompt or label counts; 1 is no guidance")
    add("--num_steps", type=int, help="steps of the sampler, of a diffusion model, too")
    add("--max_new_tokens", type=int, help="length of a continuation")
    add("--temperature", type=float, help="of the draws of tokens; 0 takes the most likely one")


def check(args: argparse.Namespace, module: Any) -> PromptOptions | None:
    """The options, if the model draws from texts and was given some.

    Raises:
        ValueError: If the model takes no prompt or has no use for an option, or there is an option and no prompt.
    """
    from lit_generative.types import PromptOptions, SupportsPrompts

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    who = f"the {type(module).__name__} in {args.ckpt_path}"
    if not isinstance(module, SupportsPrompts):
        given = {name: value for name, value in given.items() if name not in SAMPLING}
        if args.prompt or given:
            option = "--prompt" if args.prompt else OPTIONS[next(iter(given))]
            raise ValueError(f"{option}: {who} takes no texts. Leave it out.")
        return None
    if not args.prompt:
        if given:
            raise ValueError(f"{OPTIONS[next(iter(given))]}: goes with --prompt. Add --prompt 'TEXT'.")
        return None
    for name in given:
        if name not in module.prompt_options:
            told = ", ".join(OPTIONS[name] for name in module.prompt_options)
            raise ValueError(f"{OPTIONS[name]}: {who} has no use for it. It takes {told}.")
    return PromptOptions(**given)


def draw(module: Any, args: argparse.Namespace, options: PromptOptions) -> Iterator[Tensor | list[str]]:
    """Samples of the prompts in turn, a batch at a time: pictures, or texts."""
    from lit_generative.tensor_ops import sample_generators

    for start in range(0, args.num, args.batch_size):
        num = min(args.batch_size, args.num - start)
        prompts = [args.prompt[i % len(args.prompt)] for i in range(start, start + num)]
        yield module.sample_prompts(prompts, options, sample_generators(args.seed, num, start))


def write_texts(texts: list[str], args: argparse.Namespace) -> Path:
    """Write ``samples.jsonl``: of each sample the prompt and how it goes on."""
    path = Path(args.out) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for i, text in enumerate(texts):
            prompt = args.prompt[i % len(args.prompt)]
            file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
    return path
