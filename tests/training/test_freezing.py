import pytest
import torch
from torch import nn

from lit_generative.training.freezing import count_trained, freeze, hold_statistics, matching, report


def net():
    return nn.ModuleDict({"mapping": nn.Linear(2, 3), "layers": nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 5)])})


def trained(module):
    return [name for name, p in module.named_parameters() if p.requires_grad]


def test_what_is_named_is_frozen_and_counted():
    module = net()
    report = freeze(module, freeze=["mapping", "layers.1.bias"])
    assert trained(module) == ["layers.0.weight", "layers.0.bias", "layers.1.weight"]
    assert report == (12 + 4 + 20, 9 + 16 + 25, {"mapping": 9, "layers.1.bias": 5})
    assert str(report) == "trains 36 of 50 weights (72 %); mapping: 9; layers.1.bias: 5"


def test_all_of_it_is_a_hundred_per_cent():
    assert str(report(net())) == "trains 50 of 50 weights (100 %)"


def test_only_what_is_named_is_trained_and_freezing_comes_after():
    module = net()
    freeze(module, train=["layers"], freeze=["*.bias"])
    assert trained(module) == ["layers.0.weight", "layers.1.weight"]
    assert count_trained(module) == 12 + 20


def test_what_was_frozen_before_stays_so_unless_it_is_named():
    module = net()
    module["mapping"].requires_grad_(False)
    freeze(module, freeze=["layers.0"])
    assert trained(module) == ["layers.1.weight", "layers.1.bias"]
    freeze(module, train=["mapping"])
    assert trained(module) == ["mapping.weight", "mapping.bias"]


def test_a_pattern_names_whole_names_only():
    assert matching(net(), "layers.0") == ["layers.0.weight", "layers.0.bias"]
    assert matching(net(), "layers.*.weight") == ["layers.0.weight", "layers.1.weight"]
    with pytest.raises(ValueError, match=r"no parameter is named by the pattern 'layer'\. The nearest are: .*layers"):
        matching(net(), "layer")


def test_the_end_of_a_name_finds_the_whole_name():
    with pytest.raises(ValueError, match=r"The nearest are: .*layers\.0\.weight"):
        matching(net(), "weights")


def test_nothing_left_to_train_is_refused():
    with pytest.raises(ValueError, match="leave nothing to train"):
        freeze(net(), train=["mapping"], freeze=["mapping"])


def test_frozen_batch_norm_keeps_its_statistics():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    freeze(module, freeze=["0"])
    module.train()
    hold_statistics(module)
    assert [part.training for part in module] == [False, True, True]
    before = module[0].running_mean.clone()
    module(torch.randn(8, 3) + 5)
    torch.testing.assert_close(module[0].running_mean, before)


def test_freezing_holds_statistics_at_once():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    freeze(module, freeze=["0"])
    assert not module[0].training
