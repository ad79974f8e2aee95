from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mt_adapters.data import AugmentedDataset, BadSampleError, EvalTransform, MultitaskCollator, StepSampler
from mt_adapters.tasks import get_task


def noisy(sample: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"sample": sample, "noise": rng.random()}


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    draws = list(StepSampler([[10]], num_samples=35, seed=1))
    assert len(draws) == len(StepSampler([[10]], 35)) == 35
    assert [epoch for epoch, _ in draws] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5
    orders = [[index for epoch, index in draws if epoch == number] for number in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders[:3])
    assert len(set(orders[3])) == 5
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    sampler = StepSampler([[50]], 120, seed=4)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first == list(StepSampler([[50]], 120, seed=4))
    assert list(StepSampler([[50]], 120, seed=5)) != first


def test_a_longer_training_begins_like_a_shorter_one() -> None:
    assert list(StepSampler([[7]], 30))[:12] == list(StepSampler([[7]], 12))


def test_an_epoch_of_one_seed_is_no_epoch_of_the_next_seed() -> None:
    second_epoch = [index for epoch, index in StepSampler([[50]], 100, seed=0) if epoch == 1]
    first_epoch_of_next_seed = [index for _, index in StepSampler([[50]], 50, seed=1)]
    assert second_epoch != first_epoch_of_next_seed


def test_an_epoch_is_the_permutation_that_seed_and_epoch_give() -> None:
    expected = []
    for epoch in range(2):
        mixed = np.random.SeedSequence((3, epoch)).generate_state(1, np.uint64).item()
        expected += torch.randperm(20, generator=torch.Generator().manual_seed(mixed)).tolist()
    assert [index for _, index in StepSampler([[20]], 40, seed=3)] == expected


LENGTHS = [5, 9, 1, 7, 4, 6, 3, 8, 2, 10]


def is_end_of(files: list[int], pair: tuple[int, int]) -> bool:
    num_frames = sum(LENGTHS[file] for file in pair)
    return set(files[-num_frames:]) == set(pair)


def test_frames_of_many_files_come_once_an_epoch_and_those_of_a_file_near_each_other() -> None:
    total = sum(LENGTHS)
    draws = list(StepSampler([LENGTHS], 3 * total, seed=2))
    orders = [[index for epoch, index in draws if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(total)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    file_of = np.repeat(range(len(LENGTHS)), LENGTHS)
    for order in orders:
        # Eight files are open at a time; the last two come after all of the others.
        files = file_of[order].tolist()
        late = [pair for pair in combinations(range(len(LENGTHS)), 2) if is_end_of(files, pair)]
        assert len(late) == 1
        # And within the eight, the frames of one file do not follow each other.
        assert sum(a == b for a, b in zip(files, files[1:], strict=False)) < total / 3


def test_sources_take_turns_by_their_weights_and_each_keeps_its_own_epochs() -> None:
    sampler = StepSampler([[6], [2, 2]], 40, seed=0, weights=[3, 1])
    draws = list(sampler)
    assert len(draws) == 40
    for number in range(1, 41):
        assert abs(sum(index < 6 for _, index in draws[:number]) - 0.75 * number) < 1
    for frames, count in ((range(6), 5), (range(6, 10), 2)):
        for epoch in range(count):
            assert sorted(i for e, i in draws if e == epoch and i in frames) == list(frames)
    alone = [index for _, index in StepSampler([[6]], 30, seed=0)]
    assert [index for _, index in draws if index < 6] == alone


def test_without_weights_sources_are_drawn_as_often_as_they_are_large() -> None:
    draws = [index for _, index in StepSampler([[6], [2]], 8)]
    assert sorted(draws) == list(range(8))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [1.0, float("nan")]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="2 sources need as many positive numbers"):
        StepSampler([[3], [4]], 10, weights=weights)


@pytest.mark.parametrize("lengths", [[], [[]], [[0]], [[3], [0, 0]]])
def test_an_empty_data_set_is_refused(lengths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="empty"):
        StepSampler(lengths, 10)


def test_a_sample_depends_on_seed_epoch_and_index_only() -> None:
    dataset = AugmentedDataset(range(100), noisy, seed=2)
    assert len(dataset) == 100
    first = dataset[(1, 5)]
    assert first["sample"] == 5
    np.random.default_rng(0).random(7)
    dataset[(0, 3)]
    assert dataset[(1, 5)] == first == AugmentedDataset(range(100), noisy, seed=2)[(1, 5)]
    others = [dataset[(0, 5)], dataset[(1, 6)], dataset[(5, 1)], AugmentedDataset(range(100), noisy, seed=1)[(1, 5)]]
    assert len({sample["noise"] for sample in [first, *others]}) == 5


def test_workers_do_not_change_the_batches() -> None:
    dataset = AugmentedDataset(range(11), noisy, seed=0)
    alone, shared = (
        [
            batch["noise"].tolist()
            for batch in DataLoader(dataset, batch_size=4, sampler=StepSampler([[11]], 24), num_workers=num_workers)
        ]
        for num_workers in (0, 2)
    )
    assert len(alone) == 6
    assert alone == shared


def test_a_run_that_resumes_sees_the_batches_it_would_have_seen() -> None:
    dataset = AugmentedDataset(range(11), noisy, seed=0)
    whole = [dataset[draw] for draw in StepSampler([[11]], 40)]
    resumed = [dataset[draw] for draw in list(StepSampler([[11]], 40))[16:]]
    assert resumed == whole[16:]


class Damaged:
    """Every third frame is bad; the others have a depth of one metre."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index % 3 == 0:
            raise BadSampleError(f"frame {index} is damaged")
        return {"image": torch.full((3, 8, 8), 9, dtype=torch.uint8), "labels": {"depth": torch.ones(8, 8)}}


def test_a_bad_frame_that_is_skipped_is_an_image_without_labels_and_a_problem() -> None:
    transform = EvalTransform([get_task("depth")], (4, 6))
    dataset = AugmentedDataset(Damaged(), transform, skip_bad=True)
    sample = dataset[(0, 3)]
    assert sample["problem"] == "frame 3 is damaged"
    assert sample["pixel_values"].shape == (3, 4, 6)
    assert sample["labels"] == {}
    assert "problem" not in dataset[(0, 4)]
    batch = MultitaskCollator([get_task("depth")])([dataset[(0, index)] for index in range(6)])
    assert batch["problems"] == ["frame 0 is damaged", "frame 3 is damaged"]
    assert batch["labels"]["depth"].amax(dim=(1, 2)).tolist() == [0, 1, 1, 0, 1, 1]


def test_a_bad_frame_stops_a_run_that_skips_none_and_other_errors_stop_any() -> None:
    with pytest.raises(BadSampleError, match="frame 3"):
        AugmentedDataset(Damaged(), EvalTransform([], (4, 4)))[(0, 3)]
    with pytest.raises(IndexError):
        AugmentedDataset([], EvalTransform([], (4, 4)), skip_bad=True)[(0, 3)]
