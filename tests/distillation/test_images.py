from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mt_adapters.data import RoomsDataset
from mt_adapters.data.rooms import SAMPLE_DIR
from mt_adapters.data.transforms import as_picture
from mt_adapters.distillation import open_images


def test_a_folder_gives_the_pictures_in_all_its_folders_as_upright_rgb(tmp_path: Path) -> None:
    (tmp_path / "more" / "deep").mkdir(parents=True)
    Image.new("RGBA", (5, 4), (255, 0, 0, 9)).save(tmp_path / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 3)).save(tmp_path / "more" / "deep" / "a.JPG", format="JPEG", exif=exif)
    Image.new("L", (7, 7), 128).save(tmp_path / "more" / "c.webp")
    (tmp_path / "notes.txt").write_text("no picture")
    images = open_images(tmp_path)
    assert [tuple(image.shape) for image in (images[i] for i in range(len(images)))] == [
        (3, 4, 5),
        (3, 7, 7),
        (3, 6, 3),
    ]
    assert images[0].dtype == torch.uint8
    assert images[0][:, 0, 0].tolist() == [255, 0, 0]


def test_a_rooms_folder_gives_its_training_frames() -> None:
    images, dataset = open_images(SAMPLE_DIR), RoomsDataset("train")
    assert len(images) == len(dataset)
    assert np.array_equal(images[3].permute(1, 2, 0).numpy(), as_picture(dataset[3]["image"]))


def test_the_images_that_are_held_out_are_the_last_ones() -> None:
    images = open_images(SAMPLE_DIR)
    train, holdout = images.split(0.05)
    assert (len(train), len(holdout)) == (247, 13)
    assert torch.equal(holdout[0], images[247])
    assert torch.equal(train[246], images[246])
    assert len({images.fingerprint, train.fingerprint, holdout.fingerprint}) == 3
    with pytest.raises(ValueError, match=r"1.5 of 260 images.*correct holdout"):
        images.split(1.5)
    with pytest.raises(ValueError, match=r"at least two images are needed"):
        train.split(0.004)[1].split(0.5)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"holds no pictures: give data_dir a folder with files that end in \.bmp"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist: give data_dir"):
        open_images(tmp_path / "missing")


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['text'\]; pictures are read from 'image'"):
        open_images(tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"the picture '.*a\.png' cannot be read .* write it anew, or remove it"):
        open_images(tmp_path)[0]
