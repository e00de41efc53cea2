from lit_generative.types import (
    DescribesData,
    SupportsAveraging,
    SupportsExamples,
    SupportsReconstruction,
    SupportsSampling,
    SupportsTrajectory,
)
from tests.families import FAMILIES, build, digits


def test_every_family_samples_and_names_what_to_average():
    for family in FAMILIES:
        module = build(family)
        assert isinstance(module, SupportsSampling)
        assert isinstance(module, SupportsAveraging)
        assert set(module.sampling_modules) <= dict(module.named_children()).keys()


def test_the_vaes_alone_reconstruct_and_the_ddpm_alone_has_a_trajectory_and_may_draw_from_images():
    assert [isinstance(build(family), SupportsReconstruction) for family in FAMILIES] == [False, True, True, False]
    for protocol in (SupportsTrajectory, SupportsExamples):
        assert [isinstance(build(family), protocol) for family in FAMILIES] == [False, False, False, True]


def test_data_modules_describe_what_they_yield():
    assert isinstance(digits(), DescribesData)
