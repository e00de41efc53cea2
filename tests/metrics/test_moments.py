import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from lit_generative.metrics.moments import FeatureSums, moments_of, trace_sqrt_product


def features(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + 1.5


def streamed(batches) -> FeatureSums:
    sums = FeatureSums(batches[0].shape[1])
    for batch in batches:
        sums.update(batch)
    return sums


def test_streamed_moments_are_those_of_numpy():
    x = features(57, 6)
    moments = streamed(x.split([10, 1, 0, 46])).moments()
    assert moments.count == 57
    torch.testing.assert_close(moments.mean.numpy(), x.numpy().mean(axis=0))
    torch.testing.assert_close(moments.cov.numpy(), np.cov(x.numpy(), rowvar=False))
    assert torch.equal(moments.cov, moments.cov.T)


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [0, 50, 7]])
def test_moments_do_not_depend_on_the_batches(sizes):
    x = features(57, 6)
    moments, expected = streamed(x.split(sizes)).moments(), streamed(x.flip(0).split(20)).moments()
    torch.testing.assert_close((moments.mean, moments.cov), (expected.mean, expected.cov))


def test_asking_twice_does_not_count_twice():
    sums = streamed(features(9, 3).split(4))
    first, second = sums.moments(), sums.moments()
    assert first.count == second.count == 9
    assert torch.equal(first.cov, second.cov)


def test_float32_features_far_from_zero_keep_their_covariance():
    x = features(500, 4).float() + 1e4
    expected = np.cov(x.double().numpy(), rowvar=False)
    torch.testing.assert_close(streamed(x.split(64)).moments().cov.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_copies_of_one_image_have_no_covariance():
    x = features(1, 5).float().expand(33, 5)
    moments = streamed(x.split(10)).moments()
    assert moments.cov.abs().max() < 1e-30
    assert moments_of(x).cov.abs().max() < 1e-30


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n):
    with pytest.raises(ValueError, match=f"at least two images, got {n}"):
        streamed([features(n, 3)]).moments()


def test_moments_of_a_block_at_a_time_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr("lit_generative.metrics.moments.BLOCK", 10)
    x = features(57, 6).float()
    moments = moments_of(x)
    torch.testing.assert_close(moments.mean.numpy(), x.double().numpy().mean(axis=0))
    torch.testing.assert_close(moments.cov.numpy(), np.cov(x.double().numpy(), rowvar=False))


@pytest.mark.parametrize(("n", "rank"), [(40, 6), (4, 3)])
def test_the_root_times_its_transpose_is_the_covariance_and_has_its_rank(n, rank):
    moments = moments_of(features(n, 6))
    assert moments.root.shape == (6, rank)
    torch.testing.assert_close(moments.root @ moments.root.T, moments.cov)


def test_trace_of_the_root_of_a_product_agrees_with_scipy():
    a, b = moments_of(features(50, 6)), moments_of(features(40, 6, seed=1))
    expected = float(sqrtm((a.cov @ b.cov).numpy()).real.trace())
    assert float(trace_sqrt_product(a, b)) == pytest.approx(expected, rel=1e-10)
    assert float(trace_sqrt_product(b, a)) == pytest.approx(expected, rel=1e-10)


def test_trace_of_the_root_is_exact_below_full_rank():
    x, y = features(300, 40), features(9, 40, seed=1)
    a, b = moments_of(x), moments_of(y)
    factor = (y - b.mean) / 8**0.5  # cov_b = factor^T factor
    expected = torch.linalg.svdvals(factor @ a.root).sum()
    assert len(factor) < factor.shape[1]
    torch.testing.assert_close(trace_sqrt_product(a, b), expected, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(trace_sqrt_product(b, a), expected, rtol=1e-11, atol=0.0)
