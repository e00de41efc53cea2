import builtins
import json

import lightning as L
import pytest
import torch
from PIL import Image

from lit_generative.data.batches import BatchKey
from lit_generative.data.captioned_images import CaptionedImages
from tests import tiny
from tests.data.test_resumable import SaveOn

datasets = pytest.importorskip("datasets")


def fill(folder, num: int = 5, texts: bool = True) -> None:
    """Wide pictures whose grey level is their number, with a text each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        Image.new("RGB", (6, 4), (i, i, i)).save(folder / f"{i}.png")
        if texts:
            (folder / f"{i}.txt").write_text(f"  the number\n{i} ")


def tell(folder, *lines) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


def data(folder, **changes) -> CaptionedImages:
    return CaptionedImages(
        str(folder), **{"image_size": 4, "batch_size": 2, "drop_last": False, "val_fraction": 0.0} | changes
    )


def contents(loader) -> dict[int, str]:
    """Caption of each grey level."""
    return {
        int(image[0, 0, 0]): caption
        for batch in loader
        for image, caption in zip(batch["image"], batch["caption"], strict=True)
    }


def trained_on(folder, **changes) -> dict[int, str]:
    module = data(folder, **changes)
    module.prepare_data()
    module.setup()
    return contents(module.train_dataloader())


NUMBERS = {i: f"the number {i}" for i in range(5)}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_text_beside_an_image_is_its_caption(tmp_path, in_memory, num_workers):
    fill(tmp_path)
    assert trained_on(tmp_path, in_memory=in_memory, num_workers=num_workers) == NUMBERS


def test_images_below_folders_have_their_texts_there(tmp_path):
    fill(tmp_path / "deep" / "er")
    assert trained_on(tmp_path) == NUMBERS


def test_the_lines_of_the_metadata_are_the_captions(tmp_path):
    fill(tmp_path / "sub", texts=False)
    (tmp_path / "sub" / "0.txt").write_text("not this")
    tell(tmp_path, *({"file_name": f"./sub/{i}.png", "text": f"the number {i}", "more": 1} for i in range(5)), "")
    assert trained_on(tmp_path) == NUMBERS


def test_the_column_of_the_metadata_can_be_named(tmp_path):
    fill(tmp_path, 1)
    tell(tmp_path, {"file_name": "0.png", "text": "no", "long": "yes"})
    assert trained_on(tmp_path, caption_column="long") == {0: "yes"}


def test_a_line_end_within_a_text_of_the_metadata_is_not_the_end_of_the_line(tmp_path):
    fill(tmp_path, 1)
    tell(tmp_path, '{"file_name": "0.png", "text": "a\u2028b"}')
    assert trained_on(tmp_path) == {0: "a b"}


def test_images_without_a_caption_are_named(tmp_path):
    fill(tmp_path, 9)
    for i in (0, 2, 3, 4, 5, 7):
        (tmp_path / f"{i}.txt").unlink()
    (tmp_path / "8.txt").write_text(" \n")
    expected = r"CaptionedImages: 7 images of .* have no caption, or an empty one, in <name>.txt beside it: "
    with pytest.raises(ValueError, match=expected + r"0.png, 2.png, 3.png, 4.png, 5.png, \.\.\.\. Add"):
        trained_on(tmp_path)
    tell(tmp_path, *({"file_name": f"{i}.png", "text": "a" if i else None} for i in range(8)))
    with pytest.raises(ValueError, match=r"2 images of .* in metadata.jsonl: 0.png, 8.png. Add"):
        trained_on(tmp_path)


def test_images_that_only_the_metadata_knows_are_named(tmp_path):
    fill(tmp_path, 1)
    tell(tmp_path, {"file_name": "0.png", "text": "a"}, {"file_name": "b.png", "text": "b"})
    with pytest.raises(ValueError, match=r"1 images named in metadata.jsonl are not in .*: b.png. Add"):
        trained_on(tmp_path)


@pytest.mark.parametrize("line", ["no json", '["0.png", "a"]', '{"text": "a"}', '{"file_name": 3, "text": "a"}'])
def test_a_broken_line_of_the_metadata_is_shown(tmp_path, line):
    fill(tmp_path, 1)
    tell(tmp_path, {"file_name": "0.png", "text": "a"}, line)
    with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl must be a JSON object with 'file_name'.*got '"):
        trained_on(tmp_path)


def test_an_image_that_is_told_twice_is_refused(tmp_path):
    fill(tmp_path, 1)
    tell(tmp_path, {"file_name": "0.png", "text": "a"}, {"file_name": "./0.png", "text": "b"})
    with pytest.raises(ValueError, match=r"line 2 of .* names 0.png again"):
        trained_on(tmp_path)


def test_a_text_that_is_not_utf_8_is_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "3.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"3.txt must be text in UTF-8"):
        trained_on(tmp_path)


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_a_folder_without_images_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"CaptionedImages: .*{name} (holds no images|is no folder). Looked for"):
        trained_on(tmp_path / name)


def test_the_splits_share_no_image(tmp_path):
    fill(tmp_path, 20)
    module = data(tmp_path, val_fraction=0.25, test_fraction=0.2)
    module.setup()
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    parts = [set(contents(loader)) for loader in loaders]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert parts[0] | parts[1] | parts[2] == set(range(20))


def test_training_alone_is_cropped_at_random_and_mirrored(tmp_path):
    levels = torch.arange(48, dtype=torch.uint8).reshape(4, 12)
    for i in range(40):
        Image.fromarray(levels.numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    corners = {}
    for random_crop, horizontal_flip in ((False, False), (True, False), (False, True)):
        options = {"random_crop": random_crop, "horizontal_flip": horizontal_flip, "val_fraction": 0.5}
        module = data(tmp_path, **options)
        module.setup()
        for name, loader in (("train", module.train_dataloader()), ("val", module.val_dataloader())):
            found = {int(x[0, 0, 0]) for batch in loader for x in batch["image"]}
            corners[random_crop, horizontal_flip, name] = found
    assert len(corners[True, False, "train"]) > 5
    assert corners[False, True, "train"] == {4, 7}
    assert all(found == {4} for (*_, name), found in corners.items() if name == "val")
    assert corners[False, False, "train"] == {4}


def test_views_are_a_function_of_the_runs_seed(tmp_path):
    levels = torch.arange(4 * 40, dtype=torch.uint8).reshape(4, 40)
    for i in range(6):
        Image.fromarray(levels.numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    module = data(tmp_path, random_crop=True)
    module.setup()
    key = BatchKey(0, 0, 0, torch.arange(6))
    first, again, other = (module.augment(module.splits.train, seed)[key]["image"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Sees(L.LightningModule):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight.square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_sees_floats_and_texts(tmp_path):
    fill(tmp_path / "images")
    module, images = Sees(), data(tmp_path / "images")
    tiny.train(tmp_path, module, images, max_steps=1)
    (batch,) = module.batches
    assert set(batch) == {"image", "label", "caption"}
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape[1:] == images.sample_shape == (3, 4, 4)
    levels = torch.tensor([int(caption[-1]) / 127.5 - 1 for caption in batch["caption"]])
    torch.testing.assert_close(batch["image"][:, 0, 0, 0], levels)
    assert images.num_classes is None


def test_a_resume_in_the_middle_of_an_epoch_sees_what_was_not_yet_seen(tmp_path):
    fill(tmp_path / "images", 20)
    options = {"random_crop": True, "horizontal_flip": True}
    whole, first, second = Sees(), Sees(), Sees()
    tiny.train(tmp_path, whole, data(tmp_path / "images", **options), max_steps=15)
    saves = SaveOn("on_train_batch_end", 4, tmp_path / "a.ckpt")
    tiny.train(tmp_path, first, data(tmp_path / "images", **options), max_steps=4, callbacks=[saves])
    tiny.train(tmp_path, second, data(tmp_path / "images", **options), max_steps=15, ckpt_path=tmp_path / "a.ckpt")
    seen = first.batches + second.batches
    assert [batch["caption"] for batch in seen] == [batch["caption"] for batch in whole.batches]
    tiny.assert_same([batch["image"] for batch in seen], [batch["image"] for batch in whole.batches])


def saved(folder, **columns):
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    images = [Image.new("RGB", (6, 4), (i, i, i)) for i in range(5)]
    texts = [f"the number\n{i}" for i in range(5)]
    dataset = datasets.Dataset.from_dict({"image": images, "text": texts}, features=datasets.Features(features))
    for old, new in columns.items():
        dataset = dataset.rename_column(old, new)
    dataset.save_to_disk(str(folder))
    return dataset


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_saved_data_set_gives_images_and_captions(tmp_path, num_workers):
    saved(tmp_path / "set")
    assert trained_on(tmp_path / "set", source="datasets", num_workers=num_workers) == NUMBERS


def test_columns_and_split_can_be_named(tmp_path):
    dataset = saved(tmp_path / "one", text="says", image="shows")
    datasets.DatasetDict({"part": dataset}).save_to_disk(str(tmp_path / "set"))
    options = {"source": "datasets", "image_column": "shows", "caption_column": "says", "dataset_split": "part"}
    assert trained_on(tmp_path / "set", **options) == NUMBERS


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    saved(tmp_path / "set")
    with pytest.raises(ValueError, match=r"must have a column 'says', got \['image', 'text'\]. Set image_column"):
        trained_on(tmp_path / "set", source="datasets", caption_column="says")


def test_rows_without_a_caption_are_named(tmp_path):
    dataset = datasets.Dataset.from_dict({"image": [1, 2, 3], "text": ["a", None, " "]})
    dataset.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"2 images of .*set have no caption, or an empty one: row 1, row 2. Add"):
        trained_on(tmp_path / "set", source="datasets")


def test_a_split_that_is_not_there_is_said(tmp_path):
    datasets.DatasetDict({"part": saved(tmp_path / "one")}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"split 'train' of .*set cannot be loaded: .*Give a folder of save_to_disk"):
        trained_on(tmp_path / "set", source="datasets")


def test_a_folder_that_is_no_saved_data_set_is_said(tmp_path):
    fill(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*Give a folder of save_to_disk or a name on the hub"):
        trained_on(tmp_path, source="datasets")


def test_a_name_on_the_hub_is_loaded_with_its_revision(monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_dict({"image": [1], "text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    module = CaptionedImages("owner/name", source="datasets", revision="abc", dataset_split="part")
    module.prepare_data()
    assert asked == [("owner/name", {"split": "part", "revision": "abc"})]


def test_datasets_is_asked_for_where_it_is_absent(tmp_path, monkeypatch):
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"source='datasets' needs datasets. pip install datasets"):
        data(tmp_path, source="datasets").prepare_data()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"background": "pink"}, "background must be 'white' or 'black', got 'pink'"),
        ({"source": "web"}, "source must be 'folder' or 'datasets', got 'web'"),
        ({"test_fraction": 1.0}, "test_fraction must be at least 0 and below 1"),
    ],
)
def test_an_argument_out_of_range_is_refused(argument, message):
    with pytest.raises(ValueError, match=f"CaptionedImages: {message}"):
        data("nowhere", **argument)
