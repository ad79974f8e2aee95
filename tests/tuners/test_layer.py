"""How the parts of an adapter are wired into a block (METHOD section 5), and what is left after a forward pass."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from mt_adapters import VtaAdapterConfig
from mt_adapters.backbones.base import to_map
from mt_adapters.tuners.vta import VtaLayer, find_context
from tiny_models import ALL_TASKS, FAMILIES, make_backbone, make_images, make_model, randomize

TASK_IDS = torch.tensor([2, 0])


def adapt(backbone: nn.Module, **settings) -> nn.Module:
    return randomize(get_peft_model(backbone, VtaAdapterConfig(tasks=list(ALL_TASKS), **settings))).eval()


def layers_of(model: nn.Module) -> list[VtaLayer]:
    return [module for module in model.modules() if isinstance(module, VtaLayer)]


def attend(attention: nn.Module, tokens: Tensor, bias: Tensor) -> Tensor:
    """DINOv2's attention, one head at a time, with the class token in front of the biased patch tokens."""
    parts = []
    for head in range(attention.num_attention_heads):
        columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        q, k, v = (layer(tokens)[..., columns] for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        logits = q @ k.transpose(1, 2) / attention.head_dim**0.5
        logits[:, 1:, 1:] += bias
        parts.append(F.softmax(logits, dim=-1) @ v)
    return attention.o_proj(torch.cat(parts, dim=-1))


@pytest.mark.parametrize("residual", ["stream", "figure"])
@torch.no_grad()
def test_adapted_blocks_follow_the_equations(residual):
    plain, images = make_backbone("dinov2"), make_images(FAMILIES["dinov2"].size)
    model = adapt(copy.deepcopy(plain), residual=residual)
    found = model(images, task_ids=TASK_IDS).last_hidden_state

    embedding = find_context(model).conditioning["default"](TASK_IDS)
    x = plain.embeddings(images)
    for block in plain.encoder.layer[:4]:
        x = block(x)
    skip = torch.zeros_like(x)
    for block, layer in zip(plain.encoder.layer[4:], layers_of(model), strict=True):
        adapter = layer.vta_adapter["default"]

        def tsn(name: str, norm: nn.LayerNorm, tokens: Tensor, adapter: nn.Module = adapter) -> Tensor:
            g, b1, b2 = getattr(adapter, name).film(embedding).unsqueeze(1).chunk(3, dim=-1)
            standard = F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps)
            return standard * (norm.weight * (1 + g) + b1) + norm.bias + b2

        is_stream = residual == "stream"
        normed = tsn("norm1", block.norm1, x) if is_stream else block.norm1(x)
        y = x + block.layer_scale1(attend(block.attention, normed, adapter.attention_bias(embedding)))
        if is_stream:
            output = y + block.layer_scale2(block.mlp(tsn("norm2", block.norm2, y)))
            skip = adapter.bottleneck(x + skip, embedding)
            x = output + skip
        else:
            a = block.norm2(y)
            u = tsn("norm1", block.norm2, block.mlp(a) + a)
            skip = adapter.bottleneck(u + skip, embedding)
            x = tsn("norm2", block.norm2, skip + a)
    torch.testing.assert_close(found, plain.layernorm(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_between_stages_the_skip_goes_through_its_own_copy_of_the_patch_merging():
    plain = make_backbone("swin")
    fresh = get_peft_model(copy.deepcopy(plain), VtaAdapterConfig(tasks=list(ALL_TASKS)))
    frozen = plain.encoder.layers[2].downsample
    mergings = [list(layer.vta_adapter["default"].skip_mergings) for layer in layers_of(fresh)]
    assert [len(copies) for copies in mergings] == [0, 1, 0]
    for key, tensor in mergings[1][0].state_dict().items():
        assert torch.equal(tensor, frozen.state_dict()[key])
    assert all(parameter.requires_grad for parameter in mergings[1][0].parameters())

    model = adapt(plain)
    layers, blocks, inputs, outputs = layers_of(model), [], [], []
    for layer in layers:
        layer.base_layer.register_forward_pre_hook(lambda block, args: blocks.append(args[0]))
        bottleneck = layer.vta_adapter["default"].bottleneck
        bottleneck.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        bottleneck.register_forward_hook(lambda module, args, output: outputs.append(output))
    # Stage 3 has 6 x 4 tokens, so a swapped grid would show.
    model(make_images((96, 64)), task_ids=TASK_IDS)
    merging = layers[1].vta_adapter["default"].skip_mergings[0]
    torch.testing.assert_close(inputs[0], blocks[0])
    torch.testing.assert_close(inputs[1], blocks[1] + merging(outputs[0], (6, 4)))
    torch.testing.assert_close(inputs[2], blocks[2] + outputs[1])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_of_a_forward_pass_stays_behind_even_if_it_fails(family):
    model, images = adapt(make_backbone(family)), make_images(FAMILIES[family].size)
    context = find_context(model)

    def is_clean() -> bool:
        return not context._embeddings and all(
            value is None for value in (context.task_ids, context.grid, context.skip_BNC, context.skip_grid)
        )

    model(images, task_ids=TASK_IDS)
    assert is_clean()
    expected = model(images, task_ids=TASK_IDS).last_hidden_state
    handle = layers_of(model)[-1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images, task_ids=TASK_IDS)
    handle.remove()
    assert is_clean()
    assert torch.equal(model(images, task_ids=TASK_IDS).last_hidden_state, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recorded_hidden_states_are_the_adapted_ones(family):
    backbone, images = make_backbone(family), make_images(FAMILIES[family].size)
    # transformers puts its recording hooks on the blocks at the first call that asks for them, and leaves them there.
    backbone(images, output_hidden_states=True)
    model = adapt(backbone)
    adapted = []
    layers_of(model)[-1].register_forward_hook(lambda module, args, output: adapted.append(output))
    output = model(images, task_ids=TASK_IDS, output_hidden_states=True)
    # Swin's blocks return tuples; SegFormer records its stages, normalised.
    expected = adapted[0][0] if isinstance(adapted[0], tuple) else adapted[0]
    if family == "segformer":
        expected = to_map(model.stages[-1].layer_norm(expected), tuple(output.hidden_states[-1].shape[-2:]))
    assert torch.equal(output.hidden_states[-1], expected)
    base = model.get_base_model()
    if hasattr(base, "layernorm"):
        assert torch.equal(base.layernorm(output.hidden_states[-1]), output.last_hidden_state)


@pytest.mark.parametrize("residual", ["stream", "figure"])
def test_scaled_norms_of_a_trained_copy_are_built_on_the_copys_norms(residual):
    model = adapt(make_backbone("dinov2"), train_adapted_blocks=True, residual=residual)
    for layer in layers_of(model):
        norms = {id(module) for module in layer.vta_block["default"].modules() if isinstance(module, nn.LayerNorm)}
        adapter = layer.vta_adapter["default"]
        assert {id(adapter.norm1.norm), id(adapter.norm2.norm)} <= norms


def test_affinities_load_exactly_into_a_bfloat16_model(tmp_path):
    model = make_model("dinov2")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.heads["depth"].weight.dtype == torch.bfloat16
    assert loaded.affinity.dtype == torch.float32
    assert torch.equal(loaded.affinity, model.affinity)
    assert not torch.equal(model.affinity, model.affinity.bfloat16().float())
