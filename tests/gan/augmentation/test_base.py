import pytest
import torch

from lit_generative.gan.augmentation.base import Augmentation


class Twice(Augmentation):
    def forward(self, x):
        return 2 * x


def test_an_augmentation_is_a_module_that_need_not_look_at_verdicts():
    augmentation = Twice()
    torch.testing.assert_close(augmentation(torch.ones(2)), torch.full((2,), 2.0))
    augmentation.observe(torch.zeros(2), 2)
    with pytest.raises(TypeError, match="abstract"):
        Augmentation()
