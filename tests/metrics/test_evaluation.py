import os
import stat
import warnings

import pytest
import torch

from lit_generative.metrics.evaluation import cache_folder, cached_features, collect_features, read_features
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.moments import Moments
from lit_generative.metrics.sources import DataModuleImages
from tests import families
from tests.metrics.tiny_features import TinyFeatures

ALL = [Frechet(), Kernel(), InceptionScore()]


@pytest.fixture
def source():
    data = families.digits()
    data.setup()
    return DataModuleImages(data, "val")


def features(value: float = 1.0, embedding=True) -> FeatureSet:
    kept = torch.full((4, 3), value) if embedding else None
    return FeatureSet(Moments(4, torch.full((3,), value).double(), torch.eye(3).double()), kept, None)


def same(a: FeatureSet, b: FeatureSet) -> bool:
    parts = [(a.moments.mean, b.moments.mean), (a.moments.cov, b.moments.cov)]
    if a.embedding is not None:
        parts.append((a.embedding, b.embedding))
    return a.moments.count == b.moments.count and all(torch.equal(x, y) for x, y in parts)


def test_every_image_is_passed_once_and_in_order(source):
    extractor = TinyFeatures().eval()
    done = []
    found = collect_features(source, extractor, ALL, batch_size=50, progress=done.append)
    expected = extractor(source.pixels(torch.arange(162)))
    torch.testing.assert_close(found.embedding, expected.embedding)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.moments.cov, expected.embedding.double().T.cov())
    assert done == [50, 50, 50, 12]


def test_only_what_is_asked_for_is_kept(source):
    found = collect_features(source, TinyFeatures(), [Frechet()], batch_size=50)
    assert found.embedding is None
    assert found.logits is None


def test_an_extractor_in_training_mode_is_set_to_evaluate(source):
    extractor = TinyFeatures()
    assert extractor.norm.training
    collect_features(source, extractor, ALL, batch_size=50)
    assert int(extractor.norm.num_batches_tracked) == 0


def test_features_are_computed_once_for_a_key(tmp_path):
    first = cached_features({"data": "a"}, features, tmp_path)

    def never() -> FeatureSet:
        raise AssertionError

    assert same(first, cached_features({"data": "a"}, never, tmp_path))
    assert same(cached_features({"data": "b"}, lambda: features(2.0), tmp_path), features(2.0))
    assert same(cached_features({"data": "a"}, never, tmp_path), features(1.0))


def test_a_file_cut_short_is_computed_again_and_said(tmp_path):
    cached_features({"data": "a"}, features, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=r"cannot be used .* computed again"):
        assert same(cached_features({"data": "a"}, lambda: features(3.0), tmp_path), features(3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cached_features({"data": "a"}, lambda: features(4.0), tmp_path), features(3.0))


def test_a_file_of_another_key_is_computed_again_and_said(tmp_path):
    cached_features({"data": "a"}, features, tmp_path)
    (theirs,) = tmp_path.iterdir()
    cached_features({"data": "b"}, lambda: features(2.0), tmp_path)
    (ours,) = set(tmp_path.iterdir()) - {theirs}
    os.replace(theirs, ours)
    with pytest.warns(UserWarning, match="holds other features"):
        assert same(cached_features({"data": "b"}, lambda: features(5.0), tmp_path), features(5.0))


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert same(cached_features({"data": "a"}, features, blocked / "cache"), features())


def test_no_part_of_a_file_is_left_behind(tmp_path):
    cached_features({"data": "a"}, lambda: features(embedding=False), tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"
    assert read_features(path)[0].embedding is None
    assert stat.S_ISREG(path.stat().st_mode)


def test_reading_what_is_not_there_or_not_ours_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_features(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("something else")
    with pytest.raises(ValueError, match="no features of ours"):
        read_features(tmp_path / "b.safetensors")


def test_the_cache_lies_where_the_user_says(monkeypatch):
    monkeypatch.delenv("LITGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/lit_generative"
    monkeypatch.setenv("LITGEN_CACHE", "/elsewhere")
    assert str(cache_folder()) == "/elsewhere"
