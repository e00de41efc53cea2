import argparse
import json

import pytest
import torch

from lit_generative.cli import prompts
from lit_generative.types import PromptOptions


class Painter:
    prompt_options = ("negative", "guidance_scale", "num_steps")

    def sample_prompts(self, given, options, generator):
        return torch.stack([torch.randn(3, generator=g) + len(text) for text, g in zip(given, generator, strict=True)])


class Plain:
    """Draws from noise."""


def parsed(*options, num=2):
    parser = argparse.ArgumentParser()
    prompts.add_arguments(parser)
    args = parser.parse_args(list(options))
    return argparse.Namespace(**vars(args), ckpt_path="x.ckpt", num=num, seed=3, batch_size=2, out="samples")


def test_what_was_given_is_passed_on_and_the_rest_left_to_the_model():
    args = parsed("--prompt", "a", "--negative_prompt", "b", "--guidance_scale", "2", "--num_steps", "5")
    assert prompts.check(args, Painter()) == PromptOptions("b", 2.0, 5, None, None)
    assert prompts.check(parsed("--prompt", "a"), Painter()) == PromptOptions()


def test_a_model_without_texts_is_asked_for_none():
    assert prompts.check(parsed(), Plain()) is None
    assert prompts.check(parsed(), Painter()) is None  # it may have prompts of its own


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        (["--prompt", "a"], Plain(), r"--prompt: the Plain in x\.ckpt takes no texts"),
        (["--temperature", "3"], Plain(), r"--temperature: the Plain in x\.ckpt takes no texts"),
        (["--num_steps", "3"], Painter(), "--num_steps: goes with --prompt"),
        (["--prompt", "a", "--temperature", "1"], Painter(), r"--temperature: .* It takes --negative_prompt, --guid"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, module, message):
    with pytest.raises(ValueError, match=message):
        prompts.check(parsed(*options), module)


def test_prompts_are_taken_in_turn_and_samples_do_not_depend_on_the_batch():
    args = parsed("--prompt", "a", "bbb", num=5)
    whole = torch.cat(list(prompts.draw(Painter(), args, PromptOptions())))
    args.batch_size = 5
    torch.testing.assert_close(torch.cat(list(prompts.draw(Painter(), args, PromptOptions()))), whole)
    args.prompt = ["a"]
    shift = whole - torch.cat(list(prompts.draw(Painter(), args, PromptOptions())))
    torch.testing.assert_close(shift.mean(dim=1), torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0]))


def test_texts_are_written_beside_their_prompts(tmp_path):
    args = parsed("--prompt", "Grüße", "b")
    args.out = str(tmp_path / "out")
    path = prompts.write_texts([" an alle", " c", " d"], args)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[2] == {"prompt": "Grüße", "text": " d"}
    assert [line["prompt"] for line in lines] == ["Grüße", "b", "Grüße"]
    assert "Grüße" in path.read_text()
