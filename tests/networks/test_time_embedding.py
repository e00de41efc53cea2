import math

import pytest
import torch

from lit_generative.networks.time_embedding import embeddable_time, sinusoidal_embedding


def test_steps_stay_and_times_are_scaled_to_steps():
    steps = torch.tensor([0, 3, 999])
    assert torch.equal(embeddable_time(steps), steps)
    torch.testing.assert_close(embeddable_time(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.0, 500.0, 1000.0]))


def test_half_precision_times_are_scaled_in_float32():
    assert embeddable_time(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32
    assert embeddable_time(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float64


def test_embedding_is_cosines_then_sines_of_falling_frequencies():
    features = sinusoidal_embedding(torch.tensor([0, 7]), dim=6, max_period=100.0)
    angles = [7.0, 0.7, 0.07]
    expected = [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [*map(math.cos, angles), *map(math.sin, angles)]]
    torch.testing.assert_close(features, torch.tensor(expected))


def test_neighbouring_steps_have_different_embeddings():
    features = sinusoidal_embedding(torch.arange(1000), dim=64)
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("dim", [2, 5])
def test_dims_without_pairs_are_refused(dim):
    with pytest.raises(ValueError, match=f"dim must be even and at least 4, got {dim}"):
        sinusoidal_embedding(torch.arange(3), dim=dim)
