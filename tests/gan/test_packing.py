import copy

import pytest
import torch

from lit_generative.gan.module import GAN
from lit_generative.gan.packing import Packing
from lit_generative.gan.spectral import SpectralNorm
from lit_generative.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from lit_generative.networks.mlp import MLPDiscriminator
from tests import tiny


def point_packing(num_packed: int = 3) -> Packing:
    torch.manual_seed(0)
    return Packing(MLPDiscriminator(hidden_dim=5, num_layers=1, input_dim=2 * num_packed), num_packed)


def image_packing(num_packed: int = 2) -> Packing:
    torch.manual_seed(0)
    return Packing(DCGANDiscriminator(image_size=8, channels=num_packed, width=3, batch_norm=False), num_packed)


def test_points_are_joined_along_their_coordinates():
    packing, x = point_packing(), torch.randn(6, 2)
    packs = torch.stack([torch.cat([*x[:3]]), torch.cat([*x[3:]])])
    torch.testing.assert_close(packing(x), packing.discriminator(packs))


def test_images_are_joined_along_their_channels():
    torch.manual_seed(0)
    packing = Packing(DCGANDiscriminator(image_size=8, channels=6, width=3), 2)
    x = torch.randn(4, 3, 8, 8)
    packs = torch.stack([torch.cat([x[0], x[1]]), torch.cat([x[2], x[3]])])
    logits = packing.eval()(x)
    assert logits.shape == (2,)
    torch.testing.assert_close(logits, packing.discriminator(packs))


def test_a_verdict_depends_on_its_own_pack_alone():
    packing, x = point_packing(), torch.randn(6, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(packing(x)[1], x)
    assert not slope[:3].any()
    assert slope[3:].any(dim=1).all()


def test_packs_of_one_are_the_discriminator_itself():
    packing, x = point_packing(1), torch.randn(5, 2)
    torch.testing.assert_close(packing(x), packing.discriminator(x))


def test_it_states_the_shape_of_one_image_and_no_classes():
    packing = image_packing()
    assert (packing.num_packed, packing.num_classes, packing.sample_shape) == (2, None, (1, 8, 8))
    assert packing.discriminator.sample_shape is None
    assert point_packing().sample_shape == (2,)


@pytest.mark.parametrize(
    "build",
    [lambda inner: Packing(SpectralNorm(inner), 2), lambda inner: SpectralNorm(Packing(inner, 2))],
    ids=["outside", "inside"],
)
def test_it_goes_together_with_spectral_norm(build, tmp_path):
    packing = build(MLPDiscriminator(hidden_dim=5, num_layers=1, input_dim=4))
    assert (packing.num_packed, packing.num_classes, packing.sample_shape) == (2, None, (2,))
    tiny.train(tmp_path, tiny.gan(discriminator=packing), tiny.ring())


def test_a_batch_that_does_not_fill_its_packs_is_refused_in_training():
    with pytest.raises(
        ValueError, match=r"Packing: 7 images do not fill packs of 3\. Make the data's batch_size a mult"
    ):
        point_packing()(torch.randn(7, 2))


@pytest.mark.parametrize("num", [1, 7])
def test_held_out_images_fill_the_last_pack_from_the_first(num):
    packing, x = point_packing().eval(), torch.randn(num, 2)
    filled = torch.cat([x, x, x])[: 9 if num == 7 else 3]
    torch.testing.assert_close(packing(x), packing(filled))


def test_a_discriminator_with_classes_is_refused():
    with pytest.raises(ValueError, match=r"Packing: needs an unconditional discriminator, .* num_classes=3\. Leave"):
        Packing(DCGANDiscriminator(image_size=8, channels=2, num_classes=3), 2)


def test_labels_are_refused():
    with pytest.raises(ValueError, match=r"Packing: packs have no class, got labels of shape \(6,\)"):
        point_packing()(torch.randn(6, 2), torch.zeros(6, dtype=torch.int64))


def test_a_discriminator_built_for_single_images_is_refused():
    with pytest.raises(
        ValueError, match=r"must take num_packed=2 times the data's channels, got a DCGAN.* \(1, 8, 8\)"
    ):
        Packing(DCGANDiscriminator(image_size=8, channels=1), 2)


def test_a_number_below_one_is_refused():
    with pytest.raises(ValueError, match="Packing: num_packed must be at least 1, got 0"):
        Packing(MLPDiscriminator(), 0)


def test_a_perceptron_takes_points_of_any_dimension():
    network = MLPDiscriminator(hidden_dim=5, input_dim=7)
    assert network.sample_shape == (7,)
    assert network(torch.randn(4, 7)).shape == (4,)
    assert MLPDiscriminator().sample_shape == (2,)


def test_copies_are_independent():
    packing, x = point_packing(), torch.randn(6, 2)
    copied = copy.deepcopy(packing)
    before = packing(x).detach()
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1)
    torch.testing.assert_close(packing(x).detach(), before)


@pytest.mark.parametrize("options", [{}, {"discriminator_steps": 3}, {"accumulate_grad_batches": 3}])
def test_a_gan_trains_and_validates_with_packs(options, tmp_path):
    module = tiny.gan(discriminator=point_packing(2), **options)
    before = tiny.weights(module.discriminator)
    run = tiny.train(tmp_path, module, tiny.ring(eval_batch_size=7), limit_val_batches=1.0, val_check_interval=1)
    assert run.callback_metrics["val/discriminator_loss"].isfinite()
    assert not torch.equal(before["discriminator.layers.0.weight"], module.discriminator.discriminator.layers[0].weight)


def test_a_checkpoint_builds_the_packing_again(tmp_path):
    generator = DCGANGenerator(image_size=8, channels=1, latent_dim=3, width=4)
    module = tiny.gan(generator=generator, discriminator=image_packing())
    tiny.train(tmp_path, module, tiny.digits(), max_steps=1).save_checkpoint(tmp_path / "gan.ckpt")
    loaded = GAN.load_from_checkpoint(tmp_path / "gan.ckpt")
    assert isinstance(loaded.discriminator, Packing)
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
