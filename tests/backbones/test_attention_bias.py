"""The bias that TAA gives to a family's attention stands in the logits once, whichever implementation runs."""

import math

import pytest
import torch
from torch import Tensor, nn

from mt_adapters.backbones import get_family
from tiny_models import FAMILIES, make_backbone, make_images


def second_of(stage: list[str]) -> str:
    # In windowed families odd blocks have shifted windows, and with them a mask.
    return stage[1]


def record_call(backbone: nn.Module, attention: nn.Module, images: Tensor, keywords: dict) -> tuple[tuple, dict]:
    """What the backbone gives to one of its attention modules."""
    calls = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    backbone(images, **keywords)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("num_biases", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_bias_is_added_to_the_logits_once(family, num_biases, monkeypatch):
    row, seam, backbone = FAMILIES[family], get_family(family), make_backbone(family)
    images, softmax, logits = make_images(row.size), nn.functional.softmax, []

    def recorded_softmax(values: Tensor, *args, **kwargs) -> Tensor:
        logits.append(values)
        return softmax(values, *args, **kwargs)

    for number, stage in enumerate(seam.stages(backbone.config)):
        attention = getattr(backbone.get_submodule(second_of(stage)), seam.attention)
        backbone.set_attn_implementation("sdpa")
        args, kwargs = record_call(backbone, attention, images, row.keywords)
        image_grid = seam.token_grid(backbone.config, *row.size)
        rows, columns = (
            seam.attention_grid(backbone.config, number) if seam.windowed else seam.bias_grid(args, kwargs, image_grid)
        )
        num_tokens = rows * columns + seam.num_prefix_tokens(backbone.config)
        bias_bLL = torch.randn(num_biases, num_tokens, num_tokens)
        biased_args, biased_kwargs = seam.add_attention_bias(attention, args, dict(kwargs), bias_bLL)
        fused = attention(*biased_args, **biased_kwargs)[0]

        backbone.set_attn_implementation("eager")
        logits.clear()
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "softmax", recorded_softmax)
            plain = attention(*args, **kwargs)[0]
            eager = attention(*biased_args, **biased_kwargs)[0]
        before, after = logits
        # Windows of one image stand next to each other in the batch.
        found = (after - before).unflatten(0, (len(images), -1))
        # SegFormer's keys stand for squares of tokens.
        side = math.isqrt(num_tokens // found.shape[-1])
        squares = bias_bLL.unflatten(2, (rows // side, side, columns // side, side)) if side > 1 else bias_bLL
        expected = squares.mean((3, 5)).flatten(2) if side > 1 else bias_bLL
        torch.testing.assert_close(found, expected[:, None, None].expand_as(found), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
        assert (eager - plain).abs().max() > 1e-3
