"""The wiring of an adapter in a post-norm block, Swin V2's; that of pre-norm blocks is in test_layer.py."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from mt_adapters import VtaAdapterConfig
from mt_adapters.tuners.vta import VtaLayer, find_context
from tiny_models import ALL_TASKS, make_backbone, make_images, randomize

TASK_IDS = torch.tensor([2, 0])


def attend(attention: nn.Module, tokens: Tensor, bias: Tensor) -> Tensor:
    """Cosine attention in one window, one head at a time."""
    inner, parts = attention.self, []
    table = inner.continuous_position_bias_mlp(inner.relative_coords_table).flatten(0, 2)
    positions = 16 * torch.sigmoid(table[inner.relative_position_index])
    for head in range(inner.num_attention_heads):
        columns = slice(head * inner.attention_head_size, (head + 1) * inner.attention_head_size)
        q, k, v = (layer(tokens)[..., columns] for layer in (inner.query, inner.key, inner.value))
        scale = inner.logit_scale[head].clamp(max=math.log(100)).exp()
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)
        parts.append(F.softmax(cosines * scale + positions[..., head] + bias, dim=-1) @ v)
    return attention.output.dense(torch.cat(parts, dim=-1))


@pytest.mark.parametrize("residual", ["stream", "figure"])
@torch.no_grad()
def test_adapted_post_norm_blocks_follow_the_equations(residual):
    # All tokens are in one window.
    plain = make_backbone("swinv2", image_size=16, depths=[2], num_heads=[2])
    model = get_peft_model(copy.deepcopy(plain), VtaAdapterConfig(tasks=list(ALL_TASKS), residual=residual))
    randomize(model).eval()
    images = make_images((16, 16))
    found = model(images, task_ids=TASK_IDS).last_hidden_state

    embedding = find_context(model).conditioning["default"](TASK_IDS)
    layers = [module for module in model.modules() if isinstance(module, VtaLayer)]
    x, _ = plain.embeddings(images)
    skip = torch.zeros_like(x)
    for block, layer in zip(plain.encoder.layers[0].blocks, layers, strict=True):
        adapter = layer.vta_adapter["default"]

        def tsn(name: str, norm: nn.LayerNorm, tokens: Tensor, adapter: nn.Module = adapter) -> Tensor:
            g, b1, b2 = getattr(adapter, name).film(embedding).unsqueeze(1).chunk(3, dim=-1)
            standard = F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps)
            return standard * (norm.weight * (1 + g) + b1) + norm.bias + b2

        attended = attend(block.attention, x, adapter.attention_bias(embedding))
        if residual == "stream":
            y = x + tsn("norm1", block.layernorm_before, attended)
            output = y + tsn("norm2", block.layernorm_after, block.output(block.intermediate(y)))
            skip = adapter.bottleneck(x + skip, embedding)
            x = output + skip
        else:
            y = x + block.layernorm_before(attended)
            u = tsn("norm1", block.layernorm_after, block.output(block.intermediate(y)) + y)
            skip = adapter.bottleneck(u + skip, embedding)
            x = tsn("norm2", block.layernorm_after, skip + y)
    torch.testing.assert_close(found, plain.layernorm(x), rtol=1e-4, atol=1e-4)
