"""What every family must keep. Its rows are `FAMILIES` in tiny_models.py; saved files: test_contract_files.py."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.backbones import get_family
from mt_adapters.backbones.base import to_map
from mt_adapters.tuners.vta import VtaLayer
from tiny_models import (
    ALL_TASKS,
    FAMILIES,
    assert_same,
    differ,
    logits_of,
    make_backbone,
    make_config,
    make_images,
    make_labels,
    make_model,
    randomize,
)

TASKS = list(ALL_TASKS)
OPTIONS = {
    "residual_figure": {"residual": "figure"},
    "norm_code": {"norm_mode": "code"},
    "activation_identity": {"activation": "identity"},
    "attention_dense": {"attention_matrix": "dense"},
    "train_adapted_blocks": {"train_adapted_blocks": True},
    "figure_train_adapted_blocks": {"residual": "figure", "train_adapted_blocks": True},
    "attention_grid": {"attention_grid": [3, 5]},
    "attention_grid_dense": {"attention_grid": [3, 5], "attention_matrix": "dense"},
}
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def adapt(backbone: nn.Module, **settings) -> nn.Module:
    return get_peft_model(backbone, VtaAdapterConfig(**{"tasks": TASKS} | settings))


@torch.no_grad()
def tokens_of(model: nn.Module, images: Tensor, task_ids: list[int] | None = None) -> Tensor:
    """The last hidden state as tokens; the same task for all images if one id is given."""
    keywords = dict(FAMILIES[model.config.model_type].keywords)
    if task_ids is not None:
        keywords["task_ids"] = torch.tensor(task_ids * len(images) if len(task_ids) == 1 else task_ids)
    hidden = model(images, **keywords).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def train_steps(model: nn.Module, size: tuple[int, int], num_steps: int) -> dict[str, bool]:
    """{name of a trainable parameter: whether any step gave it a gradient that is not zero}."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    moved = dict.fromkeys(trainable, False)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(make_images(size), labels=make_labels(size)).loss.backward()
        for name, parameter in trainable.items():
            assert parameter.grad is not None, f"{name} got no gradient"
            assert parameter.grad.isfinite().all(), f"{name} got a gradient that is not finite"
            moved[name] |= bool(parameter.grad.any())
        optimizer.step()
    return moved


def test_a_fresh_adapter_changes_nothing_at_any_size(family):
    row, backbone = FAMILIES[family], make_backbone(family)
    sizes = (row.size, *row.other_sizes)
    before = [tokens_of(backbone, make_images(size)) for size in sizes]
    model = adapt(backbone)
    for size, expected in zip(sizes, before, strict=True):
        for task in range(len(TASKS)):
            assert torch.equal(tokens_of(model, make_images(size), [task]), expected)
    assert differ(tokens_of(randomize(model), make_images(row.size), [0]), before[0])


def test_by_default_the_last_blocks_are_adapted(family):
    model = adapt(make_backbone(family))
    base = model.get_base_model()
    assert [name for name, module in base.named_modules() if isinstance(module, VtaLayer)] == FAMILIES[family].targets


@pytest.mark.parametrize("fan_out", ["sequential", "batched"])
@torch.no_grad()
def test_the_fan_out_equals_one_full_pass_per_task(family, fan_out):
    row, model = FAMILIES[family], make_model(family, fan_out=fan_out)
    # Batches of another size round differently, and not every family's features are of the size 1: hence in double.
    model = model.double() if fan_out == "batched" else model
    seam = model.family
    for size in (row.size, *row.other_sizes):
        images = make_images(size).to(model.dtype)
        shared = seam.run_blocks(model.backbone, seam.stem(model.backbone, images), 0, model.first_task_block)
        seen = []
        for number, (task, maps) in enumerate(model._task_maps(shared, model.tasks)):
            assert task.name == TASKS[number]
            tokens = tokens_of(model.backbone, images, [number])
            grid = maps[-1].shape[-2:]
            expected = to_map(tokens[:, seam.num_prefix_tokens(model.backbone.config) :], tuple(grid))
            if fan_out == "sequential":
                assert torch.equal(maps[-1], expected)
            else:
                torch.testing.assert_close(maps[-1], expected, rtol=1e-5, atol=1e-5)
            seen.append(expected)
        assert all(differ(seen[0], other) for other in seen[1:]), "the tasks' features must differ"


def test_a_batched_fan_out_gives_the_logits_of_a_sequential_one(family):
    model, images = make_model(family), make_images(FAMILIES[family].size, 3)
    expected = logits_of(model, images)
    model.config.fan_out = "batched"
    for name, logits in logits_of(model, images).items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-4, atol=1e-4)


def test_training_leaves_the_base_untouched_and_in_eval_mode(family):
    row = FAMILIES[family]
    model = make_model(family, backbone_changes={row.drop_path: 0.5})
    model.train()
    base = {name: p for name, p in model.backbone.named_parameters() if "vta_" not in name}
    before = {name: parameter.detach().clone() for name, parameter in base.items()}
    train_steps(model, row.size, num_steps=2)
    for name, parameter in base.items():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    for name, module in model.named_modules():
        is_base = name.startswith("backbone") and "vta_" not in name
        assert module.training == (not is_base), name
    plain = make_backbone(family, **{row.drop_path: 0.5}).train()
    assert differ(*(tokens_of(plain, make_images(row.size)) for _ in range(2))), "nothing would be dropped anyway"
    assert_same(logits_of(model, make_images(row.size)), logits_of(model, make_images(row.size)))


@pytest.mark.parametrize("start", ["get_peft_model", "from_backbone"])
def test_no_block_is_dropped_in_train_mode(family, start):
    row = FAMILIES[family]
    if start == "get_peft_model":
        model = randomize(adapt(make_backbone(family, **{row.drop_path: 0.5}))).train()
        results = [tokens_of(model, make_images(row.size), [1]) for _ in range(2)]
    else:
        # Freshly made, without a call of train or eval.
        model = VtaModel.from_backbone(make_config(family, **{row.drop_path: 0.5}), ["depth"], decoder_dim=16)
        results = [logits_of(model, make_images(row.size))["depth"] for _ in range(2)]
    assert torch.equal(*results)


def test_every_trainable_parameter_gets_a_gradient_in_one_step_and_moves_within_three(family):
    row = FAMILIES[family]
    model = make_model(family, randomized=False).train()
    first = train_steps(copy.deepcopy(model), row.size, num_steps=1)
    # What stands before a zero-initialised layer waits for it: the embedding for FiLM, say.
    waiting = {name for name, moved in first.items() if not moved}
    assert waiting
    assert all(".vta_" in name for name in waiting)
    never = [name for name, moved in train_steps(model, row.size, num_steps=3).items() if not moved]
    assert not never


def test_a_batch_of_several_tasks_equals_one_run_per_task(family):
    row = FAMILIES[family]
    model, images = randomize(adapt(make_backbone(family))).eval().double(), make_images(row.size, 4).double()
    mixed = tokens_of(model, images, [2, 0, 3, 0])
    for sample, task in enumerate([2, 0, 3, 0]):
        torch.testing.assert_close(mixed[sample], tokens_of(model, images, [task])[sample], rtol=1e-5, atol=1e-5)
    assert differ(mixed[1], tokens_of(model, images, [2])[1])


def test_unloading_gives_the_base_back_without_a_trace(family):
    row, images = FAMILIES[family], make_images(FAMILIES[family].size)
    backbone = make_backbone(family)
    weights = {name: parameter.clone() for name, parameter in backbone.state_dict().items()}
    before, num_hooks = tokens_of(backbone, images), hooks(backbone)
    model = randomize(adapt(backbone)).eval()
    assert differ(tokens_of(model, images, [0]), before)
    assert hooks(model) > num_hooks
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    assert differ(tokens_of(model, images, [0]), before), "a refused merge must not harm the adapter"

    base = model.unload()
    assert torch.equal(tokens_of(base, images), before)
    assert hooks(base) == num_hooks
    assert_same(base.state_dict(), weights)
    assert not any("vta" in name for name in vars(base))
    again = randomize(adapt(base)).eval()
    assert differ(tokens_of(again, make_images(row.size), [0]), before)


def test_a_disabled_adapter_equals_the_base(family):
    images, backbone = make_images(FAMILIES[family].size), make_backbone(family)
    before = tokens_of(backbone, images)
    model = randomize(adapt(backbone)).eval()
    with model.disable_adapter():
        assert torch.equal(tokens_of(model, images, [1]), before)
        assert torch.equal(tokens_of(model, images), before)
    assert differ(tokens_of(model, images, [1]), before)


def test_two_adapters_switch_and_one_is_deleted_and_added_again(family):
    row, images, backbone = FAMILIES[family], make_images(FAMILIES[family].size), make_backbone(family)
    base = tokens_of(backbone, images)
    model = randomize(adapt(backbone)).eval()
    first = tokens_of(model, images, [1])
    # One more block than the first adapter, and fewer tasks.
    earlier = get_family(family).blocks(backbone.config)[-len(row.targets) - 1]
    model.add_adapter("second", VtaAdapterConfig(tasks=["depth"], target_modules=[earlier, *row.targets]))
    assert torch.equal(tokens_of(model, images, [1]), first), "an adapter that is not active must not act"
    model.set_adapter("second")
    assert torch.equal(tokens_of(model, images), base)
    with pytest.raises(ValueError, match="out of range"):
        tokens_of(model, images, [1])
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(tokens_of(model, images, [1]), first)
    model.add_adapter("second", VtaAdapterConfig(tasks=["depth"], target_modules=[earlier, *row.targets]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.normal_(std=0.3)
    assert torch.equal(tokens_of(model, images, [1]), first), "an adapter that is not active must not act"
    with pytest.raises(ValueError, match="out of range"):
        # The first adapted block has no part of the active adapter.
        tokens_of(model, images, [4])
    model.set_adapter("second")
    second = tokens_of(model, images, [0])
    assert differ(second, base)
    # An adapter with one task needs no task_ids.
    exact = tokens_of(model.double(), images.double(), [0])
    torch.testing.assert_close(tokens_of(model, images.double()), exact, rtol=1e-5, atol=1e-5)
    model.float()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".second." in name
    }
    model.set_adapter("default")
    assert torch.equal(tokens_of(model, images, [1]), first)

    model.delete_adapter("default")
    assert not any(".default." in name for name, _ in model.named_parameters())
    model.set_adapter("second")
    assert torch.equal(tokens_of(model, images, [0]), second)
    model.add_adapter("default", VtaAdapterConfig(tasks=TASKS))
    model.set_adapter("default")
    assert torch.equal(tokens_of(model, images, [3]), base)


def test_transformers_own_add_adapter_works(family):
    images, backbone = make_images(FAMILIES[family].size), make_backbone(family)
    before = tokens_of(backbone, images)
    backbone.add_adapter(VtaAdapterConfig(tasks=TASKS))
    assert torch.equal(tokens_of(backbone, images, [1]), before)
    randomize(backbone).eval()
    adapted = [tokens_of(backbone, images, [task]) for task in range(4)]
    assert differ(adapted[0], adapted[1])
    backbone.disable_adapters()
    assert torch.equal(tokens_of(backbone, images), before)
    backbone.enable_adapters()
    assert torch.equal(tokens_of(backbone, images, [1]), adapted[1])
    backbone.delete_adapter("default")
    assert not any("vta_" in name for name, _ in backbone.named_parameters())


def test_adapter_keys_start_with_the_prefix_and_the_first_block_hosts_what_is_shared(family):
    backbone = make_backbone(family)
    base_names = {name for name, _ in backbone.named_parameters()}
    model = adapt(backbone).get_base_model()
    added = {name: p for name, p in model.named_parameters() if name.replace(".base_layer", "") not in base_names}
    for name, parameter in model.named_parameters():
        has_prefix = any(part.startswith("vta_") for part in name.split("."))
        assert has_prefix == (name in added) == parameter.requires_grad, name
    assert len(base_names) + len(added) == len(list(model.parameters()))
    host = f"{FAMILIES[family].targets[0]}.vta_shared.default"
    embeddings = [name for name in added if "task_embedding" in name]
    assert embeddings == [f"{host}.task_embeddings.{task}" for task in range(len(TASKS))]
    assert [name for name, _ in model.named_buffers() if "affinity" in name] == [f"{host}.affinity"]


def test_a_deep_copy_is_equal_and_independent(family):
    images, model = make_images(FAMILIES[family].size), make_model(family)
    before = logits_of(model, images)
    twin = copy.deepcopy(model)
    assert_same(logits_of(twin, images), before)
    randomize(twin, std=0.2)
    changed = logits_of(twin, images)
    assert all(differ(changed[name], before[name]) for name in before)
    assert_same(logits_of(model, images), before)
    del model
    assert_same(logits_of(twin, images), changed)


def test_odd_sizes_give_logits_of_the_inputs_size(family):
    row, model = FAMILIES[family], make_model(family)
    for size in (row.odd_size, (row.odd_size[1], row.odd_size[0])):
        logits = logits_of(model, make_images(size))
        assert [tuple(value.shape) for value in logits.values()] == [(2, c, *size) for c in (5, 1, 3, 1)]
        assert all(value.isfinite().all() for value in logits.values())
        assert model(make_images(size), labels=make_labels(size)).loss.isfinite()


def test_an_image_by_itself_gives_what_it_gives_in_a_batch(family):
    row, model = FAMILIES[family], make_model(family).double()
    for size in (row.size, row.odd_size):
        images = make_images(size, 3).double()
        batch = logits_of(model, images)
        for number in range(3):
            for name, logits in logits_of(model, images[number : number + 1]).items():
                torch.testing.assert_close(logits[0], batch[name][number], rtol=1e-7, atol=1e-7)


def test_the_sizes_seen_before_do_not_matter(family):
    row, model = FAMILIES[family], make_model(family)
    sizes = (row.size, *row.other_sizes, row.odd_size)
    fresh = [logits_of(copy.deepcopy(model), make_images(size)) for size in sizes]
    with pytest.raises(ValueError, match="image is"):
        model(make_images(row.too_small))
    smallest = model.family.min_image_size(model.backbone.config)
    for size, expected in zip(sizes, fresh, strict=True):
        logits_of(model, make_images((smallest, smallest)))
        assert_same(logits_of(model, make_images(size)), expected)


@pytest.mark.parametrize("way", ["autocast", "weights", "plain_weights"])
def test_bfloat16_runs_forward_and_backward(family, way):
    row = FAMILIES[family]
    size = row.other_sizes[0]
    images, labels = make_images(size), make_labels(size)
    if way == "plain_weights":
        model = randomize(adapt(make_backbone(family).bfloat16())).train()
        keywords = row.keywords | {"task_ids": torch.tensor([0, 1])}
        output = model(images.bfloat16(), **keywords).last_hidden_state
        assert output.dtype == torch.bfloat16
        loss = output.float().square().mean()
    else:
        model = make_model(family)
        exact = model.affinity
        expected = logits_of(model, images)
        model = model.bfloat16().train() if way == "weights" else model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            output = model(images.bfloat16() if way == "weights" else images, labels=labels)
        loss = output.loss
        assert loss.dtype == torch.float32
        assert model.affinity.dtype == torch.float32
        assert torch.equal(model.affinity, exact)
        for name, logits in output.logits.items():
            error = (logits.float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.1, f"{name}: {error}"
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "heads" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_forward_and_backward(family, option):
    row = FAMILIES[family]
    settings = OPTIONS[option]
    model = make_model(family, randomized=False, adapter=VtaAdapterConfig(**settings)).train()
    if settings.get("residual") == "figure":
        # The figure's output replaces the block's, and with it the layer scale that only the block's has.
        for name, parameter in model.named_parameters():
            parameter.requires_grad &= not any(scale in name for scale in ("layer_scale2", "lambda_2"))
    base = {name: p.detach().clone() for name, p in model.backbone.named_parameters() if ".vta_" not in name}
    never = [name for name, moved in train_steps(model, row.size, num_steps=3).items() if not moved]
    assert not never
    for name, parameter in model.backbone.named_parameters():
        if ".vta_" not in name:
            assert torch.equal(parameter, base[name]), name
        elif ".vta_block." in name:
            original = name.replace("vta_block.default", "base_layer")
            if not parameter.requires_grad:
                continue
            assert not torch.equal(parameter, base[original]), f"{name} did not train"
    for size in (row.size, *row.other_sizes):
        logits = logits_of(model.eval(), make_images(size))
        assert differ(logits["depth"], logits["edges"])
    if settings.get("residual") != "figure":
        backbone = make_backbone(family)
        before = tokens_of(backbone, make_images(row.size))
        fresh = adapt(backbone, **settings)
        assert torch.equal(tokens_of(fresh, make_images(row.size), [1]), before)
