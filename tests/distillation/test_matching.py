"""The loss of a distillation: what it compares, and that every family of backbones can be the student."""

import pytest
import torch
from torch.nn import functional as F

from mt_adapters.backbones import get_family
from mt_adapters.distillation import FeatureMatching, feature_maps
from mt_adapters.distillation.matching import partial_sums
from tiny_models import FAMILIES, make_backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_a_student_and_all_that_dense_features_use_is_trained(family):
    model = FeatureMatching(make_backbone(family), channels=[6, 5])
    height, width = FAMILIES[family].size
    features = [torch.randn(2, 4, 3, 6), torch.randn(2, 8, 8, 5)]
    losses = model.train()(torch.randn(2, 3, height, width), features)
    assert list(losses) == ["loss_0", "loss_1"]
    torch.stack([*losses.values()]).mean().backward()
    seam = get_family(family)
    without = {name for name, x in model.student.named_parameters() if x.grad is None or not x.grad.any()}
    # What comes after the last map (a pooler, a last norm) takes no part.
    assert all(seam.is_unused(name) or not model.student.get_parameter(name).requires_grad for name in without), (
        without
    )


def test_partial_sums_go_from_coarse_to_fine_and_no_finer_than_the_teacher():
    model = FeatureMatching(make_backbone("swin"), channels=[6])
    heads, maps = model.heads[0], [torch.randn(2, 24 * 2**k, 16 // 2**k, 16 // 2**k) for k in range(4)]
    sums = partial_sums(heads, maps, (8, 8))
    assert [tuple(total.shape[-2:]) for total in sums] == [(2, 2), (4, 4), (8, 8), (8, 8)]
    expected = heads[3](maps[3])
    torch.testing.assert_close(sums[0], expected)
    expected = F.interpolate(expected, scale_factor=2, mode="bilinear") + heads[2](maps[2])
    torch.testing.assert_close(sums[1], expected)
    expected = F.interpolate(expected, scale_factor=2, mode="bilinear") + heads[1](maps[1])
    torch.testing.assert_close(sums[2], expected)
    torch.testing.assert_close(sums[3], expected + F.avg_pool2d(heads[0](maps[0]), 2))


def test_the_loss_is_that_of_standardised_features_at_each_size():
    model = FeatureMatching(make_backbone("swin"), channels=[6]).eval()
    pixels, feature = torch.randn(2, 3, 64, 64), torch.randn(2, 8, 8, 6) * 3 + 5
    mean, std = torch.full((6,), 5.0), torch.tensor([3.0, 3, 3, 3, 3, 0])
    model.set_statistics([(mean, std)])
    target = torch.zeros(2, 6, 8, 8)
    # The last channel never changes, so it is nothing to learn.
    target[:, :5] = ((feature - 5) / 3).permute(0, 3, 1, 2)[:, :5]
    with torch.no_grad():
        maps = [
            F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1) for x in feature_maps(model.student, pixels)
        ]
        sums = partial_sums(model.heads[0], maps, (8, 8))
        found = model(pixels, [feature.half()])
    expected = []
    for total in sums:
        difference = (total - F.avg_pool2d(target, 8 // total.shape[-1])).abs()
        expected.append(torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean())
    torch.testing.assert_close(found["loss_0"], sum(expected) / 4, rtol=1e-3, atol=0)
    unexplained = (sums[-1] - target).square().mean() / target.square().mean()
    torch.testing.assert_close(found["unexplained_0"], unexplained, rtol=1e-3, atol=0)
