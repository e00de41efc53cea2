import pytest
import torch

from lit_generative.finetune.stylegan2_keys import (
    Entry,
    Renaming,
    count,
    nvlabs_discriminator,
    nvlabs_generator,
    renamed,
    rosinality_discriminator,
    rosinality_generator,
)
from lit_generative.networks.stylegan2_discriminator import StyleGAN2Discriminator
from lit_generative.networks.stylegan2_generator import StyleGAN2Generator
from tests.finetune import reference_stylegan2 as reference

STATE = reference.random_generator([8, 4, 2])


@pytest.mark.parametrize("renaming", [rosinality_generator(STATE, 3, 2), nvlabs_generator(3, 2)])
def test_each_weight_of_the_generator_is_named_once(renaming):
    own = set(StyleGAN2Generator(16, latent_dim=6, style_dim=6, width=2, num_mapping_layers=2).state_dict())
    ours = [entry.ours for entry in renaming.entries]
    assert len(set(ours)) == len(ours) == len({entry.theirs for entry in renaming.entries})
    assert own - set(ours) <= {"w_avg"}  # rosinality keeps it beside the network
    assert set(ours) <= own


@pytest.mark.parametrize("renaming", [rosinality_discriminator(4), nvlabs_discriminator(4)])
def test_each_weight_of_the_discriminator_is_named_once(renaming):
    ours = [entry.ours for entry in renaming.entries]
    assert sorted(ours) == sorted(StyleGAN2Discriminator(32, width=2).state_dict())
    assert len({entry.theirs for entry in renaming.entries}) == len(ours)


def test_the_largest_published_network_has_its_last_layer_at_1024_pixels():
    names = {entry.theirs: entry.ours for entry in nvlabs_generator(9, 8).entries}
    assert names["synthesis.b1024.conv1.affine.bias"] == "convs.16.conv.scale.bias"
    assert names["mapping.fc7.weight"] == "mapping.layers.7.weight"


def test_weights_are_renamed_changed_and_made_float32():
    renaming = Renaming([Entry("a", "b", lambda t: t.T), Entry("c", "d")], "kernel")
    a, c = torch.randn(2, 3).half(), torch.randn(1)
    found = renamed("x", {"a": a, "c": c, "blur.kernel": reference.KERNEL * 4}, renaming)
    torch.testing.assert_close(found, {"b": a.T.float(), "d": c})


@pytest.mark.parametrize("kernel", [torch.ones(4, 4), torch.ones(2, 2), torch.tensor([1.0, 3, 3, 1])])
def test_another_filter_is_refused(kernel):
    with pytest.raises(ValueError, match=r"x: the low-pass filter blur\.kernel must be \[1, 3, 3, 1\]"):
        renamed("x", {"blur.kernel": kernel}, Renaming([], "kernel"))


def test_missing_and_unknown_weights_are_counted_and_named():
    with pytest.raises(ValueError, match=r"x: .* 1 are missing, 2 unknown, a among them"):
        renamed("x", dict.fromkeys("bc", torch.ones(1)), Renaming([Entry("a", "a")], "kernel"))


def test_layers_are_counted_up_to_the_first_gap():
    names = dict.fromkeys(["l.1", "l.2", "l.4"], torch.ones(1))
    assert (count(names, "l.{}"), count(names, "l.{}", 1), count(names, "l.{}", 4)) == (0, 2, 1)
