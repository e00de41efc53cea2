import pytest
import torch

from lit_generative.metrics.feature_set import FeatureCollector, FeatureSet
from lit_generative.metrics.features import Features
from lit_generative.metrics.moments import moments_of


def rows(n: int = 11) -> Features:
    generator = torch.Generator().manual_seed(0)
    return Features(torch.randn(n, 4, generator=generator), torch.randn(n, 3, generator=generator))


def collected(order: list[torch.Tensor], indexed: bool = True, **keep: bool) -> FeatureSet:
    collector = FeatureCollector(4, **({"keep_embedding": True, "keep_logits": True} | keep))
    for index in order:
        batch = Features(rows().embedding[index], rows().logits[index])
        collector.update(batch, index if indexed else None)
    return collector.gather()


IN_ORDER = list(torch.arange(11).split(4))


def test_features_are_kept_in_the_order_of_arrival():
    data = collected(IN_ORDER, indexed=False)
    assert torch.equal(data.embedding, rows().embedding)
    assert torch.equal(data.logits, rows().logits)
    torch.testing.assert_close(data.moments.cov, moments_of(rows().embedding).cov)


def test_places_undo_any_order_of_arrival():
    shuffled = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    data, expected = collected(list(shuffled.split([5, 0, 1, 5]))), collected(IN_ORDER)
    assert not torch.equal(shuffled, torch.arange(11))
    assert torch.equal(data.embedding, expected.embedding)
    assert torch.equal(data.logits, expected.logits)
    torch.testing.assert_close(data.moments.cov, expected.moments.cov, rtol=1e-12, atol=1e-14)


def test_only_what_is_asked_for_is_kept():
    data = collected(IN_ORDER, keep_embedding=False, keep_logits=False)
    assert data.embedding is data.logits is None
    assert data.moments.count == 11
    assert collected(IN_ORDER, keep_embedding=False).embedding is None
    assert collected(IN_ORDER, keep_logits=False).logits is None


@pytest.mark.parametrize(("index", "place"), [(None, 11 + 6), (torch.arange(100, 111), 106)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["embedding", "logits"])
def test_a_feature_that_is_not_finite_is_named_by_its_place(index, place, value, kind):
    collector = FeatureCollector(4, keep_embedding=True, keep_logits=True)
    collector.update(rows())
    broken = rows()
    getattr(broken, kind)[6, 2] = value
    with pytest.raises(ValueError, match=f"image {place} are not finite"):
        collector.update(broken, index)
    assert torch.equal(collector.gather().embedding, rows().embedding)


def test_missing_logits_are_refused_only_if_they_are_needed():
    bare = Features(rows().embedding, None)
    FeatureCollector(4, keep_embedding=True, keep_logits=False).update(bare)
    with pytest.raises(ValueError, match="needs class logits"):
        FeatureCollector(4, keep_embedding=True, keep_logits=True).update(bare)


def test_places_of_another_number_of_images_are_refused():
    collector = FeatureCollector(4, keep_embedding=True, keep_logits=True)
    with pytest.raises(ValueError, match="must hold 11 places, one for each image, got 10"):
        collector.update(rows(), torch.arange(10))


def test_one_image_is_too_few():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        collected([torch.tensor([3])])
