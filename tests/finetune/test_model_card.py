import yaml

from lit_generative.finetune.model_card import license_of, read_origin, write_card

CONFIG = {
    "seed_everything": 3,
    "trainer": {"precision": "bf16-mixed", "max_steps": 9},
    "data": {"class_path": "lit_generative.data.digits.Digits", "init_args": {"image_size": 8}},
    "model": {"class_path": "x.TextToImage", "init_args": {"pretrained": "base"}},
}


def checkpoint(**more):
    hparams = {"_class_path": "lit_generative.finetune.text_to_image.TextToImage", "pretrained": "base"}
    return {"config": yaml.safe_dump(CONFIG), "hyper_parameters": hparams, "global_step": 7, **more}


def fields(text):
    return yaml.safe_load(text.split("---")[1])


def test_the_card_says_data_settings_and_licence(tmp_path):
    path = write_card(tmp_path, read_origin(checkpoint()), "load('x')", "openrail")
    text = path.read_text()
    assert path == tmp_path / "README.md"
    assert fields(text) == {"license": "openrail", "base_model": "base", "tags": ["lit_generative", "TextToImage"]}
    blocks = [yaml.safe_load(block.split("```")[0]) for block in text.split("```yaml")[1:]]
    assert blocks == [CONFIG["data"], {"steps": 7, "seed": 3, "precision": "bf16-mixed"}, CONFIG["model"]]
    assert "Load it: `load('x')`" in text


def test_the_licence_of_the_base_is_taken_from_its_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: llama3\ntags: [a]\n---\n# Base\n")
    assert license_of("base") == "llama3"
    text = write_card(tmp_path, read_origin(checkpoint()), "load").read_text()
    assert fields(text)["license"] == "llama3"
    assert "llama3, as far as the base's card says" in text


def test_an_unknown_licence_and_unknown_data_are_said_to_be_so(tmp_path):
    text = write_card(tmp_path, read_origin(checkpoint(config=None)), "load").read_text()
    assert fields(text)["license"] == "unknown"
    assert "unknown: not stated" in text
    assert "The checkpoint does not say." in text


def test_a_card_without_fields_says_nothing_of_a_licence(tmp_path):
    (tmp_path / "README.md").write_text("# Base\n")
    assert license_of(str(tmp_path)) is None
    assert license_of("owner/name") is None
    assert license_of(None) is None
