"""torch.compile(fullgraph=True): every family is one graph, with the numbers of the eager model and no stale ones.

The backend "eager" runs the captured graph as it is, so that results must agree to the last bit.
"""

import os
import shutil
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.tuners.vta import find_context
from tiny_models import (
    FAMILIES,
    assert_same,
    differ,
    logits_of,
    make_backbone,
    make_images,
    make_labels,
    make_model,
    randomize,
)

TASKS = ["depth", "edges", "normals"]
# Tracing takes time per block; windowed families keep one block with shifted windows and one merging.
TWO_BLOCKS = {"num_hidden_layers": 2}
TWO_STAGES = {"depths": [1, 2], "num_heads": [1, 2]}
FEW_BLOCKS = dict.fromkeys(FAMILIES, TWO_BLOCKS) | {
    "swin": TWO_STAGES,
    "swinv2": TWO_STAGES,
    "segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [24, 32],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "sr_ratios": [2, 1],
    },
}


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


def compile_counted(
    model: nn.Module, backend: str = "eager", dynamic: bool | None = False
) -> tuple[Any, CompileCounterWithBackend]:
    """The compiled model and the counter of its graphs.

    Sizes are constants by default: transformers' own Swin takes minutes to trace with symbols in their place.
    """
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic), counter


def make_short_model(family: str, num_tasks: int) -> VtaModel:
    return make_model(family, tasks=TASKS[:num_tasks], decoder="linear", backbone_changes=FEW_BLOCKS[family])


def make_short_peft_model(family: str, **changes: Any) -> nn.Module:
    backbone = make_backbone(family, **FEW_BLOCKS[family] | changes)
    return randomize(get_peft_model(backbone, VtaAdapterConfig(tasks=["a", "b", "c"]))).eval()


def with_gradients(model: nn.Module, loss: Tensor, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results, the loss and the gradient of every trainable parameter."""
    model.zero_grad()
    loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {f"gradient of {name}": parameter.grad.clone() for name, parameter in trainable.items()}
    assert gradients
    return {"loss": loss.detach()} | {name: value.detach() for name, value in results.items()} | gradients


def train_once(run: Any, model: VtaModel, size: tuple[int, int]) -> dict[str, Tensor]:
    labels = {name: label for name, label in make_labels(size).items() if name in model.task_names}
    output = run(make_images(size), labels=labels)
    return with_gradients(model, output.loss, output.logits)


def train_peft_once(run: Any, model: nn.Module, images: Tensor, task_ids: list[int], **keywords: Any) -> dict:
    hidden = run(images, task_ids=torch.tensor(task_ids), **keywords).last_hidden_state
    return with_gradients(model, hidden.square().mean(), {"hidden": hidden})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_evaluates_and_trains_as_the_eager_one_at_two_sizes(family):
    size, other_size = FAMILIES[family].size, FAMILIES[family].other_sizes[0]
    model = make_short_model(family, num_tasks=1)
    compiled, counter = compile_counted(model)
    assert_same(logits_of(compiled, make_images(size)), logits_of(model, make_images(size)))
    model.train()
    assert_same(train_once(compiled, model, other_size), train_once(model, model, other_size))
    model.eval()
    images = make_images(size) + 1
    assert_same(logits_of(compiled, images), logits_of(model, images))
    assert counter.frame_count == 2, "one graph to evaluate and one to train"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_peft_model_follows_its_task_ids_within_one_graph(family):
    row, images = FAMILIES[family], make_images(FAMILIES[family].size)
    model = make_short_peft_model(family).train()
    compiled, counter = compile_counted(model)
    found = [train_peft_once(compiled, model, images, ids, **row.keywords) for ids in ([0, 1], [2, 1], [1, 0])]
    expected = [train_peft_once(model, model, images, ids, **row.keywords) for ids in ([0, 1], [2, 1], [1, 0])]
    for results in zip(found, expected, strict=True):
        assert_same(*results)
    assert differ(expected[0]["hidden"], expected[2]["hidden"])
    assert counter.frame_count == 1


# "aot_eager" also captures the backward, and with it what the default backend generates code from.
@pytest.mark.parametrize(("family", "backend"), [("swin", "eager"), ("dinov2", "aot_eager")])
def test_several_tasks_train_in_one_graph(family, backend):
    model, size = make_short_model(family, num_tasks=2).train(), FAMILIES[family].size
    compiled, counter = compile_counted(model, backend)
    found, expected = train_once(compiled, model, size), train_once(model, model, size)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)
    assert differ(expected["depth"], expected["edges"])
    assert counter.frame_count == 1


def test_what_changes_between_two_calls_reaches_the_compiled_model():
    model, images = make_short_model("dinov2", num_tasks=2), make_images((56, 56))
    compiled, counter = compile_counted(model)
    seen = []

    def assert_new_and_as_eager(num_graphs: int, **keywords: Any) -> None:
        found = logits_of(compiled, images, **keywords)
        assert_same(found, logits_of(model, images, **keywords))
        assert all(differ(found["depth"], earlier) for earlier in seen)
        seen.append(found["depth"])
        assert counter.frame_count == num_graphs
        context = find_context(model)
        assert context.task_ids is context.grid is context.skip_BNC is None, "a later call could see this one's"
        assert context._embeddings == {}

    assert_new_and_as_eager(num_graphs=1)
    model.conditioning.set_affinity(torch.full((2, 2), 0.5), torch.full((2, 2), 0.5))
    assert_new_and_as_eager(num_graphs=1)
    randomize(model, std=0.2)
    assert_new_and_as_eager(num_graphs=1)
    enabled = seen[-1]
    model.backbone.disable_adapters()
    assert_new_and_as_eager(num_graphs=2)
    for _ in range(2):
        # Switched on again is one more graph than never switched off.
        model.backbone.enable_adapters()
        assert torch.equal(logits_of(compiled, images)["depth"], enabled)
        model.backbone.disable_adapters()
        assert torch.equal(logits_of(compiled, images)["depth"], seen[-1])
    assert counter.frame_count == 3
    model.backbone.enable_adapters()
    assert_same(logits_of(compiled, images, tasks=["edges"]), logits_of(model, images, tasks=["edges"]))
    model.config.fan_out = "batched"
    assert_same(logits_of(compiled, images), logits_of(model, images))
    assert counter.frame_count == 5


def test_images_and_batches_of_all_sizes_need_two_graphs():
    model = make_short_model("dinov2", num_tasks=1)
    compiled, counter = compile_counted(model, dynamic=None)
    for num_images, size in enumerate(((56, 56), (84, 70), (42, 98), (70, 112)), start=2):
        images = make_images(size, num_images)
        assert_same(logits_of(compiled, images), logits_of(model, images))
    assert counter.frame_count == 2, "one for the first size, one for all others"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="the default backend needs a compiler")
def test_the_default_backend_gives_the_same_gradients(tmp_path, monkeypatch):
    # Code that an earlier run left behind must not stand in for this one's.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, images = make_short_peft_model("dinov2", num_hidden_layers=1).train(), make_images((56, 56))
    compiled = torch.compile(model, fullgraph=True)
    for task_ids in ([0, 1], [2, 1]):
        found, expected = (train_peft_once(run, model, images, task_ids) for run in (compiled, model))
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text
            )
