"""The adapter's mathematics against the authors' modules and against loops written from METHOD's equations."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinAttention

from mt_adapters.backbones import get_family
from mt_adapters.troa import average_weights
from mt_adapters.tuners.vta.attention import TaskAttentionBias
from mt_adapters.tuners.vta.bottleneck import TaskBottleneck
from mt_adapters.tuners.vta.conditioning import TaskConditioning
from mt_adapters.tuners.vta.norm import TaskScaledNorm


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def copy_into(**pairs: tuple[nn.Parameter, Tensor]) -> None:
    with torch.no_grad():
        for name, (parameter, value) in pairs.items():
            assert parameter.shape == value.shape, name
            parameter.copy_(value)


# The authors' modules


@pytest.fixture(params=["window4", "window7"])
def reference(request: pytest.FixtureRequest, shared_folder: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    with safe_open(shared_folder / f"reference/{request.param}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {key: int(value) for key, value in file.metadata().items() if value.isdigit()}, tensors


def reference_bias(tensors: dict[str, Tensor]) -> Tensor:
    width = tensors["taa.matrix"].shape[1]
    bias = TaskAttentionBias((width, width), tensors["task_embedding"].shape[1])
    copy_into(
        matrix=(bias.matrix, tensors["taa.matrix"]),
        weight=(bias.film.weight, tensors["taa.film.weight"]),
        bias=(bias.film.bias, tensors["taa.film.bias"]),
    )
    return bias(tensors["task_embedding"])


@pytest.mark.pretrained
@torch.no_grad()
def test_the_attention_bias_is_the_authors(reference):
    tensors = reference[1]
    torch.testing.assert_close(reference_bias(tensors), tensors["taa.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.pretrained
@torch.no_grad()
def test_the_task_scaled_norm_in_mode_code_is_the_authors(reference):
    tensors = reference[1]
    channels = tensors["tsn.input"].shape[-1]
    norm = nn.LayerNorm(channels, eps=1e-5)
    tsn = TaskScaledNorm(norm, tensors["task_embedding"].shape[1], mode="code")
    copy_into(
        weight=(norm.weight, tensors["tsn.norm.weight"]),
        bias=(norm.bias, tensors["tsn.norm.bias"]),
        film=(tsn.film.weight, tensors["tsn.film.weight"]),
        film_bias=(tsn.film.bias, tensors.get("tsn.film.bias", torch.zeros(2 * channels))),
    )
    output = tsn(tensors["tsn.input"], tensors["task_embedding"])
    torch.testing.assert_close(output, tensors["tsn.output"], rtol=1e-5, atol=1e-5)


@pytest.mark.pretrained
@torch.no_grad()
def test_the_bottleneck_without_activation_is_the_authors(reference):
    tensors = reference[1]
    channels = tensors["bottleneck.input"].shape[-1]
    bottleneck = TaskBottleneck(channels, tensors["task_embedding"].shape[1], reduction=3, activation="identity")
    layers = {
        "condition": "emb_transf",
        "film": "hidden_modulation.gb_weights",
        "down": "down_proj_layer",
        "up": "up_proj_layer",
    }
    for ours, theirs in layers.items():
        layer = getattr(bottleneck, ours)
        copy_into(
            weight=(layer.weight, tensors[f"bottleneck.{theirs}.weight"]),
            bias=(layer.bias, tensors.get(f"bottleneck.{theirs}.bias", torch.zeros_like(layer.bias))),
        )
    output = bottleneck(tensors["bottleneck.input"], tensors["task_embedding"])
    torch.testing.assert_close(output, tensors["bottleneck.output"], rtol=1e-5, atol=1e-5)


class GivenBias(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def forward(self) -> Tensor:
        return self.bias.unsqueeze(0)


@pytest.mark.pretrained
@pytest.mark.parametrize("with_task", [True, False])
@torch.no_grad()
def test_the_adapted_swin_attention_is_the_authors(reference, with_task):
    _, tensors = reference
    tokens = tensors["attention.input"]
    channels, window = tokens.shape[-1], int(math.sqrt(tokens.shape[1]))
    num_heads = tensors["attention.relative_position_bias"].shape[0]
    attention = SwinAttention(SwinConfig(window_size=window, attn_implementation="sdpa"), channels, num_heads, window)
    projections = zip(
        (attention.q_proj, attention.k_proj, attention.v_proj),
        tensors["attention.qkv.weight"].chunk(3),
        tensors["attention.qkv.bias"].chunk(3),
        strict=True,
    )
    for layer, weight, bias in projections:
        copy_into(weight=(layer.weight, weight), bias=(layer.bias, bias))
    copy_into(
        weight=(attention.o_proj.weight, tensors["attention.proj.weight"]),
        bias=(attention.o_proj.bias, tensors["attention.proj.bias"]),
    )
    attention.relative_position_bias = GivenBias(tensors["attention.relative_position_bias"])
    task_bias = reference_bias(tensors) * (1.0 if with_task else 0.0)

    args, kwargs = get_family("swin").add_attention_bias(attention, (tokens, tensors["attention.mask"]), {}, task_bias)
    output = attention.eval()(*args, **kwargs)[0]

    expected = tensors["attention.output" if with_task else "attention.output_without_task"]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert (tensors["attention.output"] - tensors["attention.output_without_task"]).abs().max() > 1e-3


# Loops from METHOD's equations


@torch.no_grad()
def test_the_bias_is_a_prime_between_tokens_of_one_grid_row_and_zero_elsewhere():
    rows, columns, num_samples = 2, 3, 2
    bias = randomized(TaskAttentionBias((rows, columns), embedding_dim=5))
    embedding = torch.randn(num_samples, 5)
    expected = torch.zeros(num_samples, rows * columns, rows * columns)
    for sample in range(num_samples):
        film = bias.film.weight @ embedding[sample] + bias.film.bias
        for row in range(rows):
            for query in range(columns):
                for key in range(columns):
                    token = row * columns + query
                    value = (1 + film[key]) * bias.matrix[token, key] + film[columns + key]
                    expected[sample, token, row * columns + key] = value
    torch.testing.assert_close(bias(embedding), expected)


@torch.no_grad()
def test_the_dense_bias_is_a_prime_between_all_tokens():
    bias = randomized(TaskAttentionBias((2, 3), embedding_dim=5, dense=True))
    embedding = torch.randn(2, 5)
    expected = torch.zeros(2, 6, 6)
    for sample in range(2):
        film = bias.film.weight @ embedding[sample] + bias.film.bias
        for query in range(6):
            for key in range(6):
                expected[sample, query, key] = (1 + film[key]) * bias.matrix[query, key] + film[6 + key]
    torch.testing.assert_close(bias(embedding), expected)


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_a_bias_for_its_own_grid_is_not_touched_by_interpolation(dense):
    bias, embedding = randomized(TaskAttentionBias((3, 2), 4, dense=dense)), torch.randn(1, 4)
    assert torch.equal(bias(embedding, (3, 2)), bias(embedding))


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_a_constant_matrix_stays_constant_on_another_grid(dense):
    bias = TaskAttentionBias((3, 2), 4, dense=dense)
    bias.matrix.fill_(0.7)
    found = bias(torch.randn(2, 4), (4, 5))
    expected = torch.full((20, 20), 0.7)
    if not dense:
        expected = torch.block_diag(*torch.full((4, 5, 5), 0.7))
    torch.testing.assert_close(found, expected.expand(2, 20, 20))


@torch.no_grad()
def test_rows_and_both_columns_are_interpolated_along_their_own_axes():
    """A matrix that is linear in the row, the query's and the key's column stays linear inside a doubled grid."""
    rows, columns = 4, 4
    bias = TaskAttentionBias((rows, columns), 4)

    def value(row: float, query: float, key: float) -> float:
        return 100 * row + 10 * query + key

    for row in range(rows):
        for query in range(columns):
            for key in range(columns):
                bias.matrix[row * columns + query, key] = value(row, query, key)
    found = bias(torch.zeros(1, 4), (8, 8))[0]
    for row in range(1, 7):
        for query in range(1, 7):
            for key in range(1, 7):
                # Centres of the fine cells in units of the coarse ones.
                centre = [(position + 0.5) / 2 - 0.5 for position in (row, query, key)]
                assert found[row * 8 + query, row * 8 + key].item() == pytest.approx(value(*centre), rel=1e-5)


@torch.no_grad()
def test_queries_and_keys_of_a_dense_matrix_are_interpolated_along_their_own_axes():
    bias = TaskAttentionBias((4, 4), 4, dense=True)

    def value(query: tuple[float, float], key: tuple[float, float]) -> float:
        return 1000 * query[0] + 100 * query[1] + 10 * key[0] + key[1]

    for query in range(16):
        for key in range(16):
            bias.matrix[query, key] = value(divmod(query, 4), divmod(key, 4))
    found = bias(torch.zeros(1, 4), (8, 8))[0]
    for query, key in [((1, 2), (3, 5)), ((6, 4), (2, 1)), ((3, 3), (6, 6))]:
        centres = [tuple((position + 0.5) / 2 - 0.5 for position in token) for token in (query, key)]
        cell = found[query[0] * 8 + query[1], key[0] * 8 + key[1]].item()
        assert cell == pytest.approx(value(*centres), rel=1e-5)


@pytest.mark.parametrize("mode", ["slide", "code"])
@torch.no_grad()
def test_the_task_scaled_norm_follows_the_equation(mode):
    num_samples, num_tokens, channels = 2, 3, 4
    norm = randomized(nn.LayerNorm(channels, eps=1e-3))
    tsn = randomized(TaskScaledNorm(norm, 5, mode))
    hidden, embedding = torch.randn(num_samples, num_tokens, channels), torch.randn(num_samples, 5)
    expected = torch.zeros_like(hidden)
    for sample in range(num_samples):
        film = tsn.film.weight @ embedding[sample] + tsn.film.bias
        for token in range(num_tokens):
            x = hidden[sample, token]
            mean = sum(x) / channels
            variance = sum((value - mean) ** 2 for value in x) / channels
            for c in range(channels):
                standard = (x[c] - mean) / math.sqrt(variance + 1e-3)
                g, b1 = film[c], film[channels + c]
                b2 = film[2 * channels + c] if mode == "slide" else 0.0
                expected[sample, token, c] = standard * (norm.weight[c] * (1 + g) + b1) + norm.bias[c] + b2
    torch.testing.assert_close(tsn(hidden, embedding), expected)


def test_a_task_scaled_norm_does_not_own_the_pretrained_norm():
    tsn = TaskScaledNorm(nn.LayerNorm(4), 5)
    assert sorted(dict(tsn.named_parameters())) == ["film.bias", "film.weight"]


@pytest.mark.parametrize("activation", ["gelu", "identity"])
@torch.no_grad()
def test_the_bottleneck_follows_the_equation(activation):
    channels = 6
    bottleneck = randomized(TaskBottleneck(channels, 5, reduction=3, activation=activation))
    hidden, embedding = torch.randn(2, 3, channels), torch.randn(2, 5)
    assert bottleneck.down.weight.shape == (2, channels)
    expected = torch.zeros_like(hidden)
    for sample in range(2):
        condition = bottleneck.condition.weight @ embedding[sample] + bottleneck.condition.bias
        film = bottleneck.film.weight @ condition + bottleneck.film.bias
        for token in range(3):
            v = torch.stack([(1 + film[c]) * hidden[sample, token, c] + film[channels + c] for c in range(channels)])
            squeezed = bottleneck.down.weight @ v + bottleneck.down.bias
            if activation == "gelu":
                squeezed = squeezed * 0.5 * (1 + torch.erf(squeezed / math.sqrt(2)))
            expected[sample, token] = bottleneck.up.weight @ squeezed + bottleneck.up.bias
    torch.testing.assert_close(bottleneck(hidden, embedding), expected)


@torch.no_grad()
def test_fresh_modules_change_nothing():
    hidden, embedding = torch.randn(2, 4, 6), torch.randn(2, 5)
    norm = randomized(nn.LayerNorm(6))
    assert torch.equal(TaskScaledNorm(norm, 5)(hidden, embedding), norm(hidden))
    assert not TaskBottleneck(6, 5)(hidden, embedding).any()
    assert not TaskAttentionBias((2, 2), 5)(embedding).any()


# Conditioning


AFFINITY = [[0.9, 0.5, 0.0], [0.3, 0.5, 0.0], [0.6, 0.0, 0.0]]


def conditioning_with(affinity: list[list[float]]) -> TaskConditioning:
    conditioning = TaskConditioning(num_tasks=len(affinity), embedding_dim=4)
    conditioning.set_affinity(torch.tensor(affinity), average_weights(torch.tensor(affinity)))
    return conditioning


def test_weights_average_over_sources_and_a_column_of_zeros_counts_as_identity():
    weights = conditioning_with(AFFINITY).mixing_weights
    expected = torch.tensor([[0.5, 0.5, 0.0], [1 / 6, 0.5, 0.0], [1 / 3, 0.0, 1.0]])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(3))


@torch.no_grad()
def test_the_condition_is_the_weighted_sum_of_the_source_embeddings():
    conditioning = conditioning_with(AFFINITY)
    task_ids = torch.tensor([2, 0, 1, 0])
    for row, task in enumerate(task_ids.tolist()):
        total = sum(AFFINITY[source][task] for source in range(3))
        expected = torch.zeros(4)
        for source in range(3):
            weight = AFFINITY[source][task] / total if total else float(source == task)
            expected += weight * conditioning.task_embeddings[source]
        torch.testing.assert_close(conditioning(task_ids)[row], expected)


def test_a_fresh_affinity_is_the_identity_and_has_no_gradient():
    conditioning = TaskConditioning(3, 4)
    assert torch.equal(conditioning.affinity, torch.eye(3))
    conditioning(torch.tensor([0, 1])).sum().backward()
    assert not conditioning.affinity.requires_grad
    gradients = [embedding.grad for embedding in conditioning.task_embeddings]
    assert torch.equal(torch.stack(gradients), torch.tensor([[1.0] * 4, [1.0] * 4, [0.0] * 4]))


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: nn.Sequential(module).to(dtype=torch.bfloat16)[0],
    ],
)
def test_the_affinity_stays_float32_and_exact_under_casts(cast):
    exact = torch.rand(3, 3)
    conditioning = conditioning_with(exact.tolist())
    before = {name: buffer.clone() for name, buffer in conditioning.named_buffers()}
    cast(conditioning)
    assert conditioning.task_embeddings[0].dtype != torch.float32
    assert set(before) == {"affinity", "mixing_weights"}
    for name, buffer in conditioning.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
        assert buffer is getattr(conditioning, name)
    assert conditioning(torch.tensor([1])).dtype == conditioning.task_embeddings[0].dtype


def test_the_softmax_sees_the_scaled_products_and_the_bias_together():
    """The Swin seam adds one bias per sample to the logits of all its windows, with and without a mask."""
    window, channels, num_windows, num_samples = 2, 4, 3, 2
    attention = randomized(SwinAttention(SwinConfig(window_size=window, attn_implementation="sdpa"), channels, 1, 2))
    tokens = torch.randn(num_samples * num_windows, 4, channels)
    bias, mask = torch.randn(num_samples, 4, 4), torch.randn(num_windows, 4, 4)
    relative = attention.relative_position_bias()[0, 0]
    for given in (mask, None):
        args, kwargs = get_family("swin").add_attention_bias(attention, (tokens, given), {}, bias)
        found = attention(*args, **kwargs)[0]
        for row in range(len(tokens)):
            sample, index = divmod(row, num_windows)
            q, k, v = (layer(tokens[row]) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
            logits = q @ k.T / math.sqrt(channels) + relative + bias[sample] + (0 if given is None else mask[index])
            torch.testing.assert_close(found[row], attention.o_proj(F.softmax(logits, dim=-1) @ v))
