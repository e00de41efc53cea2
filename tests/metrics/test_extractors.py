import pytest

from lit_generative.metrics.extractors import NAMES, build_extractor
from lit_generative.metrics.small_nets import DigitsFeatures
from tests.inception_weights import weights_file


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_a_name_builds_its_extractor(name):
    assert build_extractor(name).name == name


def test_a_class_path_builds_its_class():
    assert type(build_extractor("lit_generative.metrics.small_nets.DigitsFeatures")) is DigitsFeatures


def test_inception_gets_its_weights_and_dtype(tmp_path_factory):
    weights = str(weights_file(tmp_path_factory))
    record = build_extractor("inception", weights=weights, dtype="bfloat16").record()
    assert (record["extractor"], record["dtype"]) == ("inception", "bfloat16")
    assert build_extractor("inception", weights=weights).record()["dtype"] == "float32"


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_the_weights_of_hub_models_are_a_folder(tmp_path, name):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="could not be loaded"):
        build_extractor(name, weights=str(tmp_path))


def test_weights_for_an_extractor_that_takes_none_are_refused():
    with pytest.raises(ValueError, match=r"digits takes no weights, got 'net\.pth'\. Leave weights out"):
        build_extractor("digits", weights="net.pth")


def test_a_dtype_for_an_extractor_that_has_no_choice_is_refused():
    with pytest.raises(ValueError, match="digits computes in float32 only, got dtype 'bfloat16'"):
        build_extractor("digits", dtype="bfloat16")


def test_an_unknown_name_is_answered_with_the_names_and_the_nearest():
    with pytest.raises(ValueError, match=r"no extractor 'incepton'\. Did you mean inception") as caught:
        build_extractor("incepton")
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(ValueError, match=r"no extractor 'qqq'\. Names:"):
        build_extractor("qqq")


@pytest.mark.parametrize("path", ["lit_generative.nowhere.Net", "lit_generative.metrics.small_nets.Nothing"])
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(ValueError, match="cannot be imported"):
        build_extractor(path)


@pytest.mark.parametrize("path", ["torch.nn.Linear", "lit_generative.metrics.small_nets.WEIGHTS"])
def test_what_is_no_extractor_is_refused(path):
    with pytest.raises(ValueError, match="must be a subclass of FeatureExtractor"):
        build_extractor(path)
