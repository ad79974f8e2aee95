import doctest
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from mt_adapters.decoders import DECODERS, Decoder, FpnDecoder, SwinUnetDecoder, fpn, get_decoder
from mt_adapters.decoders.base import octaves_to_pyramid

TASKS = ("depth", "edges")
DIM = 16
IMAGE_SIZE = 64
BACKBONES = {
    "swin": {"channels": (8, 16, 32, 64), "strides": (4, 8, 16, 32), "sizes": ((16, 16), (8, 8), (4, 4), (2, 2))},
    "vit": {"channels": (12, 12, 12, 12), "strides": (14, 14, 14, 14), "sizes": ((5, 5),) * 4},
}
ODD_SIZES = {"swin": ((9, 13), (5, 7), (3, 4), (2, 2)), "vit": ((3, 5),) * 4}
MATRIX = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in product(DECODERS, BACKBONES, (0, 2, 4), ("per_task", "one_for_all"))
]
matrix = pytest.mark.parametrize(("name", "backbone", "num_shared", "sharing"), MATRIX)
each_decoder = pytest.mark.parametrize(("name", "backbone"), list(product(DECODERS, BACKBONES)))


def make_decoder(
    name: str, backbone: str, num_shared: int = 2, sharing: str = "per_task", tasks: tuple[str, ...] = TASKS
) -> Decoder:
    torch.manual_seed(0)
    channels, strides = BACKBONES[backbone]["channels"], BACKBONES[backbone]["strides"]
    return get_decoder(name)(tasks, channels, strides, num_shared, DIM, share_between_tasks=sharing == "one_for_all")


def make_maps(backbone: str, batch_size: int = 2, sizes=None, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(BACKBONES[backbone]["channels"], sizes or BACKBONES[backbone]["sizes"], strict=True)
    return [torch.randn(batch_size, channels, *size, generator=generator) for channels, size in shapes]


def decode(decoder: Decoder, task: str, maps: list[Tensor]) -> Tensor:
    return decoder(task, decoder.prepare(maps[: decoder.num_shared]), maps[decoder.num_shared :])


@matrix
def test_the_output_has_out_channels_and_about_a_quarter_of_the_image_size(name, backbone, num_shared, sharing):
    decoder = make_decoder(name, backbone, num_shared, sharing)
    output = decode(decoder, "depth", make_maps(backbone))
    assert output.shape[:2] == (2, decoder.out_channels)
    assert output.isfinite().all()
    if name == "linear":
        assert decoder.out_channels == sum(BACKBONES[backbone]["channels"])
        assert output.shape[2:] == BACKBONES[backbone]["sizes"][0]
    else:
        assert decoder.out_channels == DIM
        assert all(IMAGE_SIZE / 4 <= side <= IMAGE_SIZE / 4 * 1.25 for side in output.shape[2:])


@matrix
def test_a_gradient_reaches_all_maps_and_all_parameters_of_the_task_and_none_of_another(
    name, backbone, num_shared, sharing
):
    decoder = make_decoder(name, backbone, num_shared, sharing)
    maps = [x.requires_grad_() for x in make_maps(backbone)]
    output = decode(decoder, "depth", maps)
    (output * torch.randn_like(output)).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in maps)
    for key, parameter in decoder.named_parameters():
        if key.startswith("tasks.edges."):
            assert parameter.grad is None, key
        else:
            assert parameter.grad is not None, key
            # A key bias adds the same amount to all logits of a query, so softmax is blind to it.
            assert parameter.grad.abs().sum() > 0 or key.endswith("k_proj.bias"), key


@matrix
def test_maps_prepared_once_give_each_task_what_a_decoder_of_its_own_gives(name, backbone, num_shared, sharing):
    decoder = make_decoder(name, backbone, num_shared, sharing)
    shared_maps = make_maps(backbone)[:num_shared]
    task_maps = {task: make_maps(backbone, seed=seed)[num_shared:] for seed, task in enumerate(TASKS, start=2)}
    calls = Counter()
    for key, module in decoder.named_modules():
        module.register_forward_hook(lambda *_, key=key: calls.update([key]))
    with torch.no_grad():
        prepared = decoder.prepare(shared_maps)
        together = {task: decoder(task, prepared, task_maps[task]) for task in TASKS}
    assert all(count == 1 for key, count in calls.items() if key.startswith("shared.prepare"))
    for task in TASKS:
        lone = make_decoder(name, backbone, num_shared, sharing, tasks=(task,))
        lone.load_state_dict({k: v for k, v in decoder.state_dict().items() if k in lone.state_dict()})
        with torch.no_grad():
            assert torch.equal(together[task], lone(task, lone.prepare(shared_maps), task_maps[task]))


@matrix
def test_the_state_dict_splits_by_task(name, backbone, num_shared, sharing):
    keys = make_decoder(name, backbone, num_shared, sharing).state_dict().keys()
    prefixes = ("shared.",) if sharing == "one_for_all" else ("shared.", *(f"tasks.{task}." for task in TASKS))
    assert all(key.startswith(prefixes) for key in keys)
    per_task = [[key.split(".", 2)[2] for key in keys if key.startswith(f"tasks.{task}.")] for task in TASKS]
    assert per_task[0] == per_task[1]
    assert bool(per_task[0]) == (name != "linear" and sharing == "per_task")


@each_decoder
def test_two_tasks_with_decoders_of_their_own_differ_and_with_one_decoder_agree(name, backbone):
    maps = make_maps(backbone)
    for num_shared, sharing in product((2, 4), ("per_task", "one_for_all")):
        decoder = make_decoder(name, backbone, num_shared, sharing)
        same = torch.equal(decode(decoder, "depth", maps), decode(decoder, "edges", maps))
        assert same == (name == "linear" or sharing == "one_for_all")


@pytest.mark.parametrize("name", ["fpn", "swin_unet"])
def test_one_decoder_on_maps_that_are_all_shared_runs_once_for_all_tasks(name):
    decoder = make_decoder(name, "swin", num_shared=4, sharing="one_for_all")
    calls = Counter()
    decoder.shared["decode"].register_forward_hook(lambda *_: calls.update(["decode"]))
    prepared = decoder.prepare(make_maps("swin"))
    assert decoder("depth", prepared, []) is decoder("edges", prepared, [])
    assert calls["decode"] == 1


@each_decoder
def test_odd_sizes_and_a_batch_of_one_work(name, backbone):
    decoder = make_decoder(name, backbone)
    output = decode(decoder, "depth", make_maps(backbone, batch_size=1, sizes=ODD_SIZES[backbone]))
    scale = 4 if backbone == "vit" and name != "linear" else 1
    assert output.shape == (1, decoder.out_channels, *(scale * side for side in ODD_SIZES[backbone][0]))
    assert output.isfinite().all()


@pytest.mark.parametrize("name", list(DECODERS))
def test_maps_that_were_rounded_down_work(name):
    sizes = ((9, 13), (4, 6), (2, 3), (1, 1))
    assert decode(make_decoder(name, "swin"), "depth", make_maps("swin", sizes=sizes)).shape[2:] == (9, 13)


@each_decoder
def test_each_sample_is_decoded_alone(name, backbone):
    decoder = make_decoder(name, backbone).train()
    maps = make_maps(backbone, batch_size=3)
    whole = decode(decoder, "depth", maps)
    for row in range(3):
        alone = decode(decoder, "depth", [x[row : row + 1] for x in maps])
        torch.testing.assert_close(whole[row : row + 1], alone, atol=1e-5, rtol=0)


@each_decoder
def test_training_and_evaluation_compute_the_same(name, backbone):
    decoder, maps = make_decoder(name, backbone), make_maps(backbone)
    assert torch.equal(decode(decoder.train(), "depth", maps), decode(decoder.eval(), "depth", maps))


@each_decoder
def test_a_saved_decoder_loads_to_the_same_outputs(name, backbone):
    decoder, maps = make_decoder(name, backbone), make_maps(backbone)
    loaded = make_decoder(name, backbone)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    loaded.load_state_dict(decoder.state_dict())
    assert torch.equal(decode(decoder, "edges", maps), decode(loaded, "edges", maps))


@each_decoder
def test_a_decoder_can_be_built_without_memory(name, backbone):
    with torch.device("meta"):
        decoder = make_decoder(name, backbone)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert decoder.state_dict().keys() == make_decoder(name, backbone).state_dict().keys()


def test_the_linear_decoder_has_no_parameters_and_keeps_its_finest_map_normalised():
    decoder = make_decoder("linear", "swin", num_shared=0)
    maps = make_maps("swin")
    assert not decoder.state_dict()
    finest = maps[0]
    mean, variance = finest.mean(1, keepdim=True), finest.var(1, unbiased=False, keepdim=True)
    expected = (finest - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(decode(decoder, "depth", maps)[:, :8], expected)


@pytest.mark.parametrize(
    ("strides", "octaves"),
    [((4, 8, 16, 32), [0, 0, 0, 0]), ((14, 14, 14, 14), [2, 1, 0, -1]), ((8, 8, 8, 8), [1, 0, -1, -2])],
)
def test_each_level_is_scaled_by_the_power_of_two_nearest_to_its_place(strides, octaves):
    assert [octaves_to_pyramid(stride, level) for level, stride in enumerate(strides)] == octaves


def test_the_fpn_keeps_detail_inside_a_vit_token():
    decoder = make_decoder("fpn", "vit")
    lateral = decoder.shared["prepare"][0]
    assert lateral.projection.out_channels == DIM * 4 * 4
    cells = lateral(make_maps("vit")[0])[:, :, :4, :4]
    assert cells.std(dim=(2, 3)).min() > 0


def test_a_map_of_one_window_is_attended_as_a_whole_by_the_shifted_block():
    shifted = SwinUnetDecoder(TASKS, (8,), (4,), 1, DIM).tasks["depth"].bottleneck[1]
    assert shifted.shift_size == 3
    tokens = torch.randn(1, 49, DIM, requires_grad=True)
    shifted(tokens, (7, 7), always_partition=True)[0][0, -1].sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()


def test_the_shifted_block_connects_neighbouring_windows_and_not_opposite_edges():
    shifted = SwinUnetDecoder(TASKS, (8,), (4,), 1, DIM).tasks["depth"].bottleneck[1]
    tokens = torch.randn(1, 14 * 14, DIM, requires_grad=True)
    shifted(tokens, (14, 14), always_partition=True)[0].view(14, 14, DIM)[6, 6].sum().backward()
    reached = tokens.grad.abs().sum(-1).view(14, 14) > 1e-12
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[3:10, 3:10] = True
    assert torch.equal(reached, expected)


def test_the_example_of_the_fpn_decoder_runs():
    result = doctest.testmod(fpn)
    assert result.attempted > 0
    assert result.failed == 0


def test_an_unknown_decoder_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="unknown decoder 'unet'; known: fpn, swin_unet, linear"):
        get_decoder("unet")


def test_an_unknown_task_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="unknown task 'semseg'; this decoder has: depth, edges"):
        decode(make_decoder("fpn", "swin"), "semseg", make_maps("swin"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task_names": ("depth", "depth")}, "task_names"),
        ({"task_names": ()}, "task_names"),
        ({"strides": (4,)}, "one entry per feature map"),
        ({"num_shared": 3}, "num_shared must be between 0 and the 2"),
        ({"dim": 0}, "dim must be at least 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changed, message):
    arguments = {"task_names": TASKS, "channels": (8, 16), "strides": (4, 8), "num_shared": 1, "dim": DIM}
    with pytest.raises(ValueError, match=message):
        FpnDecoder(**{**arguments, **changed})


def test_the_swin_decoder_refuses_a_dim_that_heads_cannot_share():
    with pytest.raises(ValueError, match="multiple of 32, or at most 32, got 48; the nearest allowed are 32 and 64"):
        SwinUnetDecoder(TASKS, (8, 16), (4, 8), 1, dim=48)


@pytest.mark.parametrize(("dim", "num_heads"), [(24, [2, 1]), (32, [2, 1]), (64, [4, 2])])
def test_heads_of_the_swin_decoder_have_equal_width(dim, num_heads):
    task = SwinUnetDecoder(TASKS, (8, 16), (4, 8), 1, dim).tasks["depth"]
    attentions = [task.bottleneck[0].attention, task.stages[0].blocks[0].attention]
    assert [attention.num_attention_heads for attention in attentions] == num_heads
    assert {attention.head_dim for attention in attentions} == {min(dim, 32)}
