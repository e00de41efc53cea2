import pytest

from lit_generative.data.digits import Digits
from lit_generative.training.checks import check_class, check_data, check_weights
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
