import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.gan.augmentation.adaptive import OPERATIONS, AdaptiveAugmentation
from lit_generative.gan.module import GAN
from lit_generative.gan.penalties import R1
from tests import tiny

REAL, FAKE = torch.ones(4), -torch.ones(4)


def augmented(x, seed: int = 0, p: float = 1.0, operations=OPERATIONS):
    torch.manual_seed(seed)
    return AdaptiveAugmentation(initial_p=p, operations=operations)(x)


# ---- images


@pytest.mark.parametrize("operations", [*([name] for name in OPERATIONS), OPERATIONS])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_shape_and_type_and_gradients_pass(operations, channels):
    x = torch.randn(6, channels, 8, 8, requires_grad=True)
    y = augmented(x, operations=operations)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.square().sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_with_probability_zero_it_is_the_identity_and_with_one_no_image_stays():
    x = torch.randn(16, 3, 8, 8)
    assert torch.equal(augmented(x, p=0.0), x)
    y = augmented(x, p=1.0)
    assert not any(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_the_same_seed_gives_the_same_and_another_does_not():
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(augmented(x), augmented(x))
    assert not torch.equal(augmented(x), augmented(x, seed=1))


def test_an_image_does_not_depend_on_the_others():
    x = torch.randn(5, 3, 8, 8)
    changed = x.clone()
    changed[2] = 7.0
    before, after = augmented(x), augmented(changed)
    others = [0, 1, 3, 4]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[2], after[2])


def test_each_image_has_its_own_draw():
    y = augmented(torch.randn(1, 3, 8, 8).expand(8, -1, -1, -1))
    assert len({tuple(image.flatten().tolist()) for image in y}) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    x = torch.randn(4, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = augmented(x)
    torch.testing.assert_close(y, augmented(x.float()).to(dtype), rtol=0, atol=0)


def test_images_need_not_be_square_without_quarter_turns():
    x = torch.randn(2, 3, 4, 8)
    operations = [name for name in OPERATIONS if name != "rotate_90"]
    assert augmented(x, operations=operations).shape == x.shape
    with pytest.raises(ValueError, match="rotate_90 needs square images, got 4x8"):
        augmented(x)


# ---- controller


def test_p_follows_the_sign_of_what_exceeds_the_target():
    augmentation = AdaptiveAugmentation(target=0.6, interval=2, adjust_images=100)

    def observe(*real_logits):
        for logits in real_logits:
            augmentation.observe(logits, 5)
        return float(augmentation.p)

    assert observe(REAL) == 0.0  # half of an interval
    assert observe(REAL) == pytest.approx(0.1)  # r = 1, 10 of 100 images
    assert float(augmentation.overfitting) == 1.0
    three_of_four = torch.tensor([3.0, 0.1, 2.0, -9.0])
    assert observe(three_of_four, REAL) == pytest.approx(0.2)  # r = 0.75
    assert observe(three_of_four, three_of_four) == pytest.approx(0.1)  # r = 0.5
    assert float(augmentation.overfitting) == pytest.approx(0.5)
    assert observe(FAKE, FAKE) == pytest.approx(0.0, abs=1e-7)
    assert observe(FAKE, FAKE) == 0.0  # not below


def test_every_verdict_counts_alike_whatever_the_size_of_its_batch():
    augmentation = AdaptiveAugmentation(interval=2)
    augmentation.observe(torch.ones(7), 7)
    augmentation.observe(-torch.ones(1), 1)
    assert float(augmentation.overfitting) == pytest.approx(6 / 8)


def test_p_stays_where_the_target_is_met_exactly():
    augmentation = AdaptiveAugmentation(target=0.5, interval=1, initial_p=0.3)
    augmentation.observe(torch.tensor([1.0, 1.0, 1.0, -1.0]), 4)
    assert float(augmentation.p) == pytest.approx(0.3)


def test_p_rises_from_zero_to_one_within_the_images_said_and_not_above():
    augmentation = AdaptiveAugmentation(interval=4, adjust_images=800)
    history = []
    for _ in range(220):
        augmentation.observe(REAL, 4)
        history.append(float(augmentation.p))
    assert history[198] == pytest.approx(0.98)
    assert history[199] == pytest.approx(1.0)
    assert max(history) <= 1.0


def test_a_logit_that_is_no_number_is_undecided():
    augmentation = AdaptiveAugmentation(interval=1, initial_p=0.5, adjust_images=10)
    augmentation.observe(torch.tensor([float("nan"), 1.0]), 1)
    assert float(augmentation.overfitting) == 0.5
    assert float(augmentation.p) == pytest.approx(0.4)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_controller_goes_on_from_its_state_wherever_it_stopped(stop):
    torch.manual_seed(0)
    verdicts = torch.randn(12, 3) + 1
    whole = AdaptiveAugmentation(target=0.0, interval=3, adjust_images=50)
    first = copy.deepcopy(whole)
    second = AdaptiveAugmentation(target=0.0, interval=3, adjust_images=50, initial_p=0.9)
    second.observe(FAKE, 7)  # forgotten
    for i, logits in enumerate(verdicts):
        whole.observe(logits, 3)
        if i == stop:
            second.load_state_dict(first.state_dict())
        (first if i < stop else second).observe(logits, 3)
    assert float(whole.p) > 0
    tiny.assert_same(dict(second.state_dict()), dict(whole.state_dict()))


def _observe_its_own(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    augmentation = AdaptiveAugmentation(interval=2, adjust_images=100)
    for _ in range(3):
        augmentation.observe(torch.ones(6) if rank == 0 else torch.tensor([-1.0, 1.0]), 8)
    torch.save(augmentation.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree_also_within_an_interval(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_observe_its_own, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    tiny.assert_same(dict(first), dict(second))
    assert float(first["overfitting"]) == pytest.approx(6 / 8)  # each verdict counts alike
    assert float(first["p"]) == pytest.approx(16 / 100)
    assert first["signs"].tolist() == [6.0, 8.0]


# ---- within a GAN


def gan(**options) -> GAN:
    augmentation = AdaptiveAugmentation(target=-0.9, interval=3, adjust_images=40)
    return tiny.image_gan(augmentation=augmentation, penalties=[R1(gamma=1.0)], **options)


def test_a_run_survives_a_resume_bit_by_bit(tmp_path):
    def train(steps, ckpt_path=None):
        module = gan()
        options = {"callbacks": [Checkpoint(100, dirpath=str(tmp_path))], "max_steps": steps, "ckpt_path": ckpt_path}
        tiny.train(tmp_path, module, tiny.digits(), **options)
        return module

    whole = train(8)
    train(5)  # in the middle of an interval
    resumed = train(8, tmp_path / "last.ckpt")
    assert float(whole.augmentation.p) == pytest.approx(2 * 18 / 40)
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))


def test_a_checkpoint_builds_it_again(tmp_path):
    callbacks = [Checkpoint(100, dirpath=str(tmp_path))]
    tiny.train(tmp_path, gan(), tiny.digits(), callbacks=callbacks)
    loaded = GAN.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (loaded.augmentation.interval, loaded.augmentation.operations) == (3, list(OPERATIONS))
    assert float(loaded.augmentation.p) == pytest.approx(18 / 40)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target must lie between -1 and 1, got 1.0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"adjust_images": 0}, "adjust_images must be at least 1, got 0"),
        ({"initial_p": 1.5}, r"initial_p must lie in \[0, 1\], got 1.5"),
        ({"operations": []}, r"operations must be some of .* got \[\]"),
        ({"operations": ["flip"]}, r"operations must be some of .* got \['flip'\]"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"AdaptiveAugmentation: {message}"):
        AdaptiveAugmentation(**options)


def test_points_and_odd_channels_are_refused():
    with pytest.raises(ValueError, match=r"needs images \(N, C, H, W\), got \(3, 2\)"):
        augmented(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\['hue'\] need 1 or 3 channels, got 2"):
        augmented(torch.zeros(3, 2, 4, 4), operations=["x_flip", "hue"])
    assert augmented(torch.zeros(3, 2, 4, 4), operations=["x_flip"]).shape == (3, 2, 4, 4)
