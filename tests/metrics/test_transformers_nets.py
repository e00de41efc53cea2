import sys

import pytest
import torch
from torch.nn import functional as F

from lit_generative.metrics.resizing import CleanResize
from lit_generative.metrics.transformers_nets import CLIP, DINOv2

transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(**TINY, image_size=56, patch_size=14)
    transformers.Dinov2Model(config).half().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    vision = {**TINY, "intermediate_size": 20, "image_size": 48, "patch_size": 16, "projection_dim": 12}
    text = {**TINY, "intermediate_size": 20, "vocab_size": 30, "projection_dim": 12}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images():
    return torch.randint(256, (3, 3, 30, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_dinov2_gives_the_class_token_of_standardised_images(dinov2, images):
    extractor = DINOv2(dinov2)
    embedding, logits = extractor(images)
    assert logits is None
    assert embedding.dtype == torch.float32
    assert embedding.shape == (3, extractor.dim) == (3, 16)
    x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    net = transformers.Dinov2Model.from_pretrained(dinov2, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(embedding, net(x).last_hidden_state[:, 0])


def test_clip_gives_the_embedding_of_its_own_processor(clip, images):
    extractor = CLIP(clip)
    embedding = extractor(images).embedding
    assert embedding.shape == (3, extractor.dim) == (3, 12)
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=True)
    x = processor(list(CleanResize()(images, 48)), return_tensors="pt", input_data_format="channels_first")
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(**x).pooler_output)
    torch.testing.assert_close(embedding, expected)


@pytest.fixture(params=["dinov2", "clip"])
def extractor(request):
    build = {"dinov2": DINOv2, "clip": CLIP}[request.param]
    return build(request.getfixturevalue(request.param))


def test_a_grey_image_is_repeated_to_three_channels(extractor, images):
    grey = images[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_the_record_is_plain_data(extractor):
    record = extractor.record()
    assert record["extractor"] == extractor.name
    assert record["dim"] == extractor.dim
    assert (record["resize"], record["image_size"]) == {"dinov2": ("bicubic", 224), "clip": ("clean", 48)}[
        extractor.name
    ]
    assert record["grey_images"] == "repeated to 3 channels"
    assert extractor.frechet_key == f"fd_{extractor.name}"


def test_the_weights_are_float32_frozen_and_in_evaluation_mode(extractor):
    assert {p.dtype for p in extractor.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not any(module.training for module in extractor.train().modules())


def test_autocast_does_not_change_features(extractor, images):
    with torch.autocast("cpu", torch.bfloat16):
        fast = extractor(images)
    torch.testing.assert_close(fast, extractor(images), rtol=0, atol=0)


def test_building_one_draws_no_random_numbers(dinov2):
    before = torch.get_rng_state()
    DINOv2(dinov2)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_floats_are_refused(extractor):
    with pytest.raises(ValueError, match=f"{type(extractor).__name__}: need uint8"):
        extractor(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("build", [DINOv2, CLIP])
def test_a_folder_without_a_model_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match=f"{build.__name__}: .* could not be loaded: .*config.json"):
        build(str(tmp_path))


def test_another_kind_of_model_is_refused(clip):
    with pytest.raises(ValueError, match=r"DINOv2: .* must hold every weight of Dinov2Model"):
        DINOv2(clip)


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path, dinov2):
    net = transformers.Dinov2Model.from_pretrained(dinov2)
    state = {key: value for key, value in net.state_dict().items() if key != "layernorm.weight"}
    net.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"and 1 are missing, layernorm\.weight among them"):
        DINOv2(str(tmp_path))


@pytest.mark.parametrize("build", [DINOv2, CLIP])
def test_without_transformers_the_error_says_what_to_install(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers.*lit-generative\[finetune\]"):
        build()
