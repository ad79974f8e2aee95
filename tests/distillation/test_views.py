import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mt_adapters.data.rooms import SAMPLE_DIR
from mt_adapters.distillation import Images, TeacherViews, ViewSettings, feature_maps, open_images, views
from tiny_models import make_backbone

SETTINGS = ViewSettings(
    num_views=3, image_size=32, teacher_image_size=56, teacher_maps=(0, 2), crop_scale=(0.4, 1.0), batch_size=2, seed=0
)


class Killed(BaseException):
    """What a simulated kill raises: nothing in the program catches it."""


@pytest.fixture
def images() -> Images:
    return open_images(SAMPLE_DIR).split(0.98)[0]


def test_views_hold_crops_and_what_the_teacher_gives_for_them(tmp_path: Path, images: Images) -> None:
    teacher = make_backbone("dinov2").eval()
    made = TeacherViews(tmp_path / "views", images, teacher, SETTINGS)
    assert len(made) == 3 * len(images) == 15
    shown = torch.stack([made[i]["image"] for i in range(15)]).float()
    _, seen = zip(*(made.cropped[i] for i in range(15)), strict=True)
    # Both see the same crop, at their own sizes.
    small = F.interpolate(torch.stack(seen), size=(32, 32), mode="bilinear", antialias=True)
    for view, other in zip(shown.flatten(0, 1).flatten(1), small.flatten(0, 1).flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([view, other]))[0, 1] > 0.98
    # Views of one image differ, and those of another are others.
    assert len({view.numpy().tobytes() for view in shown}) == 15
    with torch.no_grad():
        maps = feature_maps(teacher, torch.stack(seen[4:6]))
    for number, feature in zip((0, 2), made[4]["features"], strict=True):
        assert feature.dtype == torch.float16
        torch.testing.assert_close(feature.float(), maps[number][0].permute(1, 2, 0), rtol=2e-3, atol=2e-3)


def test_the_statistics_are_those_of_all_channels(tmp_path: Path, images: Images) -> None:
    made = TeacherViews(tmp_path, images, make_backbone("dinov2").eval(), SETTINGS)
    values = torch.stack([made[i]["features"][1] for i in range(15)]).double().flatten(0, 2)
    mean, std = made.statistics()[1]
    torch.testing.assert_close(mean, values.mean(0).float())
    torch.testing.assert_close(std, values.std(0, correction=0).float())


def test_making_views_goes_on_where_it_was_stopped(
    tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_backbone("dinov2").eval()
    TeacherViews(tmp_path / "whole", images, teacher, SETTINGS)
    monkeypatch.setattr(views, "FLUSH_INTERVAL", 3)
    seen, may_see = [], 5

    def counted(model, pixels):
        if len(seen) == may_see:
            raise Killed
        seen.append(len(pixels))
        return feature_maps(model, pixels)

    monkeypatch.setattr(views, "feature_maps", counted)
    with pytest.raises(Killed):
        TeacherViews(tmp_path / "killed", images, teacher, SETTINGS)
    assert json.loads((tmp_path / "killed/views.json").read_text())["done"] == 6
    # One image to learn the shapes; six of the fifteen views are there.
    seen, may_see = [], 100
    TeacherViews(tmp_path / "killed", images, teacher, SETTINGS)
    assert seen == [1, 2, 2, 2, 2, 1]
    for file in ("images.npy", "features_0.npy", "features_2.npy"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    seen = []
    assert TeacherViews(tmp_path / "killed", images, teacher, SETTINGS).seconds > 0
    assert seen == [1]


@pytest.mark.parametrize("change", ["settings", "images", "teacher"])
def test_views_of_something_else_are_made_anew(tmp_path: Path, images: Images, change: str) -> None:
    teacher = make_backbone("dinov2").eval()
    TeacherViews(tmp_path, images, teacher, SETTINGS, "digest")
    settings = ViewSettings(**(vars(SETTINGS) | {"seed": 1})) if change == "settings" else SETTINGS
    other = open_images(SAMPLE_DIR).split(0.99)[0] if change == "images" else images
    made = TeacherViews(tmp_path, other, teacher, settings, "other" if change == "teacher" else "digest")
    assert len(made) == 3 * len(other)
    assert json.loads((tmp_path / "views.json").read_text())["done"] == len(made)
    state = json.loads((tmp_path / "views.json").read_text())["identity"]
    assert state["seed"] == settings.seed
    assert state["teacher"] == ("other" if change == "teacher" else "digest")


@pytest.mark.parametrize("maps", [(), (4,), (-1,)])
def test_maps_that_the_teacher_does_not_have_are_refused(
    tmp_path: Path, images: Images, maps: tuple[int, ...]
) -> None:
    settings = ViewSettings(**(vars(SETTINGS) | {"teacher_maps": maps}))
    with pytest.raises(ValueError, match=r"this dinov2 teacher has the maps 0 to 3: give some of these"):
        TeacherViews(tmp_path, images, make_backbone("dinov2"), settings)


def test_features_that_float16_cannot_hold_are_refused(tmp_path: Path, images: Images) -> None:
    teacher = make_backbone("dinov2").eval()
    torch.nn.init.constant_(teacher.layernorm.bias, 1e5)
    with pytest.raises(ValueError, match=r"map 0 of the teacher holds NaN or more than 65504"):
        TeacherViews(tmp_path, images, teacher, SETTINGS)
