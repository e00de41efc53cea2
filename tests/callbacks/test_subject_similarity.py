import pytest
import torch

from lit_generative.callbacks.subject_similarity import SubjectSimilarity
from lit_generative.data.mixtures import RingMixture
from lit_generative.metrics.features import FeatureExtractor, Features
from lit_generative.tensor_ops import from_uint8
from tests import tiny
from tests.callbacks.prompted import PROMPTS, Draws, subject
from tests.callbacks.test_prompt_evaluation import fit
from tests.metrics.tiny_features import TinyFeatures


class Direction(FeatureExtractor):
    """Two numbers: the mean of red and that of green."""

    name, dim = "direction", 2

    def forward(self, images) -> Features:
        return Features(images.float().mean(dim=(2, 3))[:, :2], None)


def similarity(**changes) -> SubjectSimilarity:
    arguments = {"extractor": TinyFeatures(), "prompts": PROMPTS, "num_samples": 7, "batch_size": 3}
    return SubjectSimilarity(**arguments | changes)


def test_it_is_the_mean_over_all_pairs_with_the_training_pictures(tmp_path):
    callback, module, data = similarity(), Draws(), subject()
    trainer = fit(tmp_path, callback, module=module, data=data)
    drawn = callback.draw(trainer, module)
    images = data.examples("train", torch.arange(4))
    pairs = [
        torch.cosine_similarity(TinyFeatures().eval()(x[None]).embedding, TinyFeatures().eval()(y[None]).embedding)
        for x in drawn
        for y in images
    ]
    assert len(pairs) == 7 * 4
    assert callback.scores == {"subject_similarity": pytest.approx(float(torch.cat(pairs).mean()), rel=1e-5)}
    assert float(trainer.callback_metrics["val/subject_similarity"]) == pytest.approx(
        callback.scores["subject_similarity"], rel=1e-5
    )


def test_a_value_by_hand(tmp_path):
    callback = similarity(extractor=Direction())
    trainer = tiny.trainer(tmp_path)
    trainer.datamodule = subject()
    picture = torch.tensor([3, 4, 9], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 32, 32)
    trainer.datamodule.subject_pictures = lambda: [picture] * 2
    trainer.datamodule.setup()
    pictures = torch.tensor([[3, 4, 0], [4, 3, 0], [0, 5, 7]], dtype=torch.uint8).reshape(3, 3, 1, 1)
    # cosines with (3, 4): 1, 24 / 25 and 4 / 5
    assert callback.score(trainer, pictures)["subject_similarity"] == pytest.approx((1 + 0.96 + 0.8) / 3)


def test_copies_of_one_training_picture_are_as_similar_as_that_is_to_all(tmp_path):
    callback, module, data = similarity(prompts=["a"], num_samples=4), Draws(), subject(num_images=1)
    picture = from_uint8(data.subject_pictures()[0])
    module.sample_prompts = lambda prompts, options, generator: torch.stack([picture] * len(prompts))
    fit(tmp_path, callback, module=module, data=data)
    assert callback.scores["subject_similarity"] == pytest.approx(1)


def test_training_brings_pictures_nearer_to_the_subject(tmp_path):
    callback, module = similarity(extractor=Direction()), Draws()
    module.level.data = torch.tensor([0.9, -0.9, 0.0])
    trainer = tiny.trainer(tmp_path)
    trainer.datamodule = subject()
    trainer.datamodule.setup()
    before = callback.measure(trainer, module)["subject_similarity"]
    fit(tmp_path, callback, module=module)
    assert callback.scores["subject_similarity"] > before + 0.1


def test_the_subject_is_looked_at_once_and_again_with_other_data(tmp_path):
    callback, counts = similarity(num_samples=3), []
    forward = callback.extractor.forward
    callback.extractor.forward = lambda images: counts.append(len(images)) or forward(images)
    fit(tmp_path, callback)
    fit(tmp_path, callback, data=subject(num_images=6))
    assert counts == [4, 3, 3, 3, 6, 3, 3, 3]


def test_the_extractor_is_neither_trained_nor_saved(tmp_path):
    callback = similarity()
    fit(tmp_path, callback).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"level"}
    assert set(checkpoint["callbacks"]["SubjectSimilarity"]) == {"scores"}


def test_data_without_single_pictures_is_refused(tmp_path):
    loader = torch.utils.data.DataLoader([{"image": torch.zeros(3, 6, 5)}] * 8, batch_size=4)
    trainer = tiny.trainer(tmp_path, max_steps=2, callbacks=[similarity()])
    with pytest.raises(TypeError, match="gives no images to compare with"):
        trainer.fit(Draws(), loader, loader)


def test_data_of_points_is_refused(tmp_path):
    module = Draws()
    module.training_step = lambda batch, batch_idx: module.level.sum()
    with pytest.raises(ValueError, match=r"need images \(N, C, H, W\) to score"):
        fit(tmp_path, similarity(), module=module, data=RingMixture(num_samples=200, batch_size=4))
