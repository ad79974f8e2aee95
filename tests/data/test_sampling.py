from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mt_adapters.data import AugmentedDataset, StepSampler


def noisy(sample: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"sample": sample, "noise": rng.random()}


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    draws = list(StepSampler(dataset_size=10, num_samples=35, seed=1))
    assert len(draws) == len(StepSampler(10, 35)) == 35
    assert [epoch for epoch, _ in draws] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5
    orders = [[index for epoch, index in draws if epoch == number] for number in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders[:3])
    assert len(set(orders[3])) == 5
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    sampler = StepSampler(50, 120, seed=4)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first == list(StepSampler(50, 120, seed=4))
    assert list(StepSampler(50, 120, seed=5)) != first


def test_a_longer_training_begins_like_a_shorter_one() -> None:
    assert list(StepSampler(7, 30))[:12] == list(StepSampler(7, 12))


def test_an_epoch_of_one_seed_is_no_epoch_of_the_next_seed() -> None:
    second_epoch = [index for epoch, index in StepSampler(50, 100, seed=0) if epoch == 1]
    first_epoch_of_next_seed = [index for _, index in StepSampler(50, 50, seed=1)]
    assert second_epoch != first_epoch_of_next_seed


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StepSampler(0, 10)


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
            for batch in DataLoader(dataset, batch_size=4, sampler=StepSampler(11, 24), num_workers=num_workers)
        ]
        for num_workers in (0, 2)
    )
    assert len(alone) == 6
    assert alone == shared


def test_a_run_that_resumes_sees_the_batches_it_would_have_seen() -> None:
    dataset = AugmentedDataset(range(11), noisy, seed=0)
    whole = [dataset[draw] for draw in StepSampler(11, 40)]
    resumed = [dataset[draw] for draw in list(StepSampler(11, 40))[16:]]
    assert resumed == whole[16:]
