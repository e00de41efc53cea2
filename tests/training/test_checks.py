import pytest
import torch
from torch import nn

from lit_generative.data.digits import Digits
from lit_generative.training.checks import (
    check_class,
    check_data,
    check_gives_logits,
    check_weights,
    disjoint,
    find_modules,
    named_optimizers,
)
from tests import tiny


def test_data_that_fits_passes_and_a_stranger_is_not_checked():
    check_data(tiny.image_gan(num_classes=10), Digits())
    check_data(tiny.image_gan(), object())
    check_data(tiny.image_gan(), None)


def test_another_shape_names_network_and_both_shapes():
    with pytest.raises(ValueError, match=r"model.generator \(DCGANGenerator\).*\(1, 8, 8\).*\(1, 16, 16\)"):
        check_data(tiny.image_gan(), Digits(image_size=16))


@pytest.mark.parametrize(("classes", "data"), [(3, Digits), (10, None)])
def test_other_classes_are_refused(classes, data):
    described = Digits()
    if data is None:
        described = type("Unlabelled", (Digits,), {"num_classes": None})()
    with pytest.raises(ValueError, match=f"takes labels of {classes} classes"):
        check_data(tiny.image_gan(num_classes=classes), described)


def test_the_class_in_a_checkpoint_must_be_the_modules():
    check_class(tiny.vae(), None)
    check_class(tiny.vae(), "lit_generative.vae.module.VAE")
    with pytest.raises(ValueError, match="holds a GAN, but the model is a VAE"):
        check_class(tiny.vae(), "lit_generative.gan.module.GAN")


def test_weights_that_do_not_fit_name_the_setting_that_differs():
    wide, narrow = tiny.vae(hidden_dim=7), tiny.vae(hidden_dim=6)
    check_weights(narrow, narrow.state_dict(), narrow.hparams)
    with pytest.raises(ValueError, match=r"do not fit this VAE: encoder.*hidden_dim=7.*hidden_dim=6"):
        check_weights(narrow, wide.state_dict(), wide.hparams)


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.LogSigmoid()])
def test_a_discriminator_that_gives_probabilities_is_refused(last):
    message = f"X: the discriminator must give logits, and Sequential ends in a {type(last).__name__}. Leave it out"
    for layers in ([nn.Linear(2, 1), last], [nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 1), last)]):
        with pytest.raises(ValueError, match=message):
            check_gives_logits("X", nn.Sequential(*layers))


def test_a_sigmoid_within_is_no_matter():
    check_gives_logits("X", nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)))
    check_gives_logits("X", nn.Module())


def test_modules_are_found_by_name_and_by_pattern_each_once():
    module = tiny.gan()
    assert list(find_modules("X", module, ["discriminator", "generator.layers.0"])) == [
        "generator.layers.0",
        "discriminator",
    ]
    assert list(find_modules("X", module, ["*.layers.0", "generator.layers.?"])) == [
        name for name, _ in module.named_modules() if name.endswith("layers.0") or name.startswith("generator.layers.")
    ]
    assert find_modules("X", module, []) == {}


@pytest.mark.parametrize("pattern", ["generater", "", "Generator", "generator.*.9"])
def test_a_name_that_finds_no_module_is_refused(pattern):
    with pytest.raises(ValueError, match="X: GAN has no sub-module"):
        find_modules("X", tiny.gan(), [pattern])


def test_a_wrong_name_comes_with_the_nearest_or_else_with_the_outermost():
    with pytest.raises(ValueError, match=r"no sub-module 'generater'. The nearest are: generator"):
        find_modules("X", tiny.gan(), ["generater"])
    with pytest.raises(ValueError, match=r"no sub-module 'zzz'. It has: discriminator, generator"):
        find_modules("X", tiny.gan(), ["zzz"])


def test_optimizers_go_by_their_first_groups_name_or_a_number():
    def sgd(*names):
        groups = [{"params": [nn.Parameter(torch.ones(1))]} | ({"name": name} if name else {}) for name in names]
        return torch.optim.SGD(groups, lr=0.1)

    assert list(named_optimizers([sgd("generator"), sgd("a", "b"), sgd(""), sgd(""), sgd("generator"), sgd("")])) == [
        "generator",
        "a",
        "optimizer",
        "optimizer-1",
        "generator-1",
        "optimizer-2",
    ]


def test_a_part_within_another_is_taken_from_it_and_other_overlaps_are_refused():
    parts = {"all": {1, 2, 3, 4}, "most": {1, 2, 3}, "one": {1}, "other": {5}}
    assert disjoint("X", parts) == {"all": {4}, "most": {2, 3}, "one": {1}, "other": {5}}
    for other in ({3, 4}, {1, 2, 3}):
        with pytest.raises(ValueError, match="X: 'a' and 'b' share parameters, which would be taken twice"):
            disjoint("X", {"a": {1, 2, 3}, "b": other})
