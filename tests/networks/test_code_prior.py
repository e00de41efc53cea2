import pytest
import torch

from lit_generative.networks.code_prior import PixelCNNPrior
from lit_generative.tensor_ops import sample_generators

SIZE, NUM_CODES = 4, 5


def prior(**options) -> PixelCNNPrior:
    torch.manual_seed(0)
    arguments = {"num_codes": NUM_CODES, "grid_size": SIZE, "width": 6, "num_layers": 3} | options
    return PixelCNNPrior(**arguments).double()


def grids(num: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(NUM_CODES, (num, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def influence(module: PixelCNNPrior) -> torch.Tensor:
    """Whether the logits at position ``j`` depend on the code at ``i``, both in raster order: ``[i, j]``, bool."""
    codes = grids(1).repeat(SIZE**2, 1, 1)
    changed = codes.flatten(1)
    changed[range(SIZE**2), range(SIZE**2)] = (changed.diagonal() + 1) % NUM_CODES
    with torch.no_grad():
        difference = module(changed.view_as(codes)) - module(grids(1))
    return (difference != 0).any(dim=1).flatten(1)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_code_changes_no_logits_there_or_before(num_layers):
    seen = influence(prior(num_layers=num_layers))
    assert not seen.tril().any()
    assert seen.any()


def test_with_enough_layers_a_code_changes_all_logits_after_it():
    assert influence(prior(num_layers=3)).triu(1).sum() == SIZE**2 * (SIZE**2 - 1) / 2  # no blind spot


def test_the_reach_of_few_layers_is_what_the_docstring_says():
    seen = influence(prior(num_layers=1)).view(SIZE, SIZE, SIZE, SIZE)
    last = seen[:, :, SIZE - 1, SIZE - 1]
    assert last[SIZE - 1].tolist() == [False, True, True, False]  # two columns to the left
    assert last.any(dim=1).tolist() == [False, True, True, True]  # two rows up


def test_the_first_rows_have_the_logits_that_they_have_in_the_whole_grid():
    module, codes = prior(), grids()
    torch.testing.assert_close(module(codes[:, :2]), module(codes)[:, :, :2])


def test_the_probabilities_of_all_grids_sum_to_one():
    module = prior(num_codes=2, grid_size=3)
    codes = (torch.arange(2**9)[:, None] >> torch.arange(9)) % 2
    with torch.no_grad():
        logits = module(codes.view(-1, 3, 3))
    nll = torch.nn.functional.cross_entropy(logits, codes.view(-1, 3, 3), reduction="none").sum(dim=(1, 2))
    torch.testing.assert_close((-nll).exp().sum(), torch.tensor(1.0).double())


def test_samples_are_as_frequent_as_they_are_probable():
    module, num = prior(num_codes=3, grid_size=2, num_classes=2), 4000
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(4)  # far from uniform
    y = torch.arange(num) % 2
    codes = module.sample(num, y, torch.Generator().manual_seed(0))
    assert codes.shape == (num, 2, 2)
    every = (torch.arange(3**4)[:, None] // 3 ** torch.arange(4) % 3).view(-1, 2, 2)
    for label in (0, 1):
        with torch.no_grad():
            logits = module(every, torch.full((len(every),), label))
        probability = (-torch.nn.functional.cross_entropy(logits, every, reduction="none").sum(dim=(1, 2))).exp()
        drawn = (codes[y == label].flatten(1) * 3 ** torch.arange(4)).sum(dim=1).bincount(minlength=81) / (num / 2)
        torch.testing.assert_close(drawn.double(), probability, rtol=0, atol=0.035)
        assert probability.max() > 0.1


def test_a_sample_does_not_depend_on_its_batch():
    module, y = prior(num_classes=3), torch.arange(8) % 3
    together = module.sample(8, y, sample_generators(5, 8))
    apart = [module.sample(n, y[i : i + n], sample_generators(5, n, i)) for i, n in ((0, 3), (3, 5))]
    assert torch.equal(together, torch.cat(apart))
    assert len(together.unique(dim=0)) > 4
    assert module.sample(0, y[:0], []).shape == (0, SIZE, SIZE)


def test_the_class_matters():
    module = prior(num_classes=3)
    numbers = torch.zeros(1, dtype=torch.int64)
    assert not torch.allclose(module(grids(1), numbers), module(grids(1), numbers + 1))


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    module = prior(num_classes=num_classes)
    y = None if num_classes is None else torch.tensor([0, 1, 2] * 3)
    codes = grids(9)
    torch.nn.functional.cross_entropy(module(codes, y), codes).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_sampling_is_in_evaluation_mode_and_leaves_the_modes_as_they_were():
    module, modes = prior().train(), []
    module.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    module.sample(1)
    assert modes == [False] * SIZE**2
    assert module.training


@pytest.mark.parametrize("name", ["num_codes", "grid_size", "width", "num_layers"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"PixelCNNPrior: {name} must be at least 1, got 0"):
        prior(**{name: 0})


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_out_of_range_is_refused(dropout):
    with pytest.raises(ValueError, match=f"dropout must be at least 0 and below 1, got {dropout}"):
        prior(dropout=dropout)


def test_dropout_acts_in_training_alone():
    module, codes = prior(dropout=0.5), grids()
    assert not torch.equal(module(codes), module(codes))
    module.eval()
    assert torch.equal(module(codes), module(codes))
    torch.testing.assert_close(module(codes), prior()(codes))


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4, 3), (2, 4)])
def test_grids_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"needs codes of shape \(N, 4, 4\), got .* Set grid_size"):
        prior()(torch.zeros(shape, dtype=torch.int64))


def test_a_missing_and_a_needless_label_are_refused():
    with pytest.raises(ValueError, match="num_classes=3, so it needs labels"):
        prior(num_classes=3).sample(2)
    with pytest.raises(ValueError, match="without num_classes, so it takes no labels"):
        prior()(grids(), torch.tensor([0, 1]))
