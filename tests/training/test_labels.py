import pytest
import torch
from torch.utils.data import DataLoader

from lit_generative.training.labels import check_batch_labels, check_labels, labels_of
from tests import tiny


@pytest.mark.parametrize("build", [tiny.image_gan, tiny.ddpm])
def test_a_model_with_classes_and_data_without_labels_do_not_go_together(tmp_path, build):
    images = DataLoader([{"image": torch.zeros(4, 1, 8, 8)}], batch_size=None)
    message = r"(GAN|DDPM): a model of 10 classes needs labels, but the batch holds \['image'\] alone. Add 'label'"
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, max_steps=1).fit(build(num_classes=10), images)
    tiny.trainer(tmp_path, max_steps=1).fit(build(), images)


def test_labels_are_those_of_the_batch():
    label = torch.tensor([2, 0])
    assert labels_of("GAN", {"label": label}, 3) is label
    assert labels_of("GAN", {"label": label}, None) is None


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            [0, 10],
            r"(GAN|DDPM): the data's labels must lie in 0..9, as the networks have num_classes=10, got 0..10",
        ),
        ([-1, 3], r"must lie in 0..9, .* got -1..3. Number the classes from 0, or raise num_classes"),
        ([0.0, 1.0], r"labels must be int64 of shape \(N,\), got float32 of shape \(2,\)"),
        ([[0], [1]], r"labels must be int64 of shape \(N,\), got int64 of shape \(2, 1\)"),
    ],
)
@pytest.mark.parametrize("build", [tiny.image_gan, tiny.ddpm])
def test_labels_that_name_no_class_are_refused_at_the_first_batch(tmp_path, build, label, message):
    # The null class of a diffusion model, 10, would else be trained without a word.
    data = DataLoader([{"image": torch.zeros(2, 1, 8, 8), "label": torch.tensor(label)}], batch_size=None)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, max_steps=1).fit(build(num_classes=10), data)
    tiny.trainer(tmp_path, max_steps=1).fit(build(), data)  # which looks at none


def test_no_labels_are_labels():
    check_batch_labels("GAN", torch.zeros(0, dtype=torch.int64), 3)
    check_labels("GAN", 0, 3, torch.zeros(0, dtype=torch.int64))


def test_samples_take_whole_numbers():
    with pytest.raises(ValueError, match="GAN: labels must be int64, got float32"):
        check_labels("GAN", 2, 3, torch.tensor([0.0, 1.0]))
