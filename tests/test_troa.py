"""TROA finds planted relations between tasks, and does to each entry what its equations say (METHOD section 2).

Shape suffixes: T tasks, P parameters, H parts of the batch (1 or 2 halves), B images, N positions, D inputs.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from mt_adapters.troa import (
    Similarity,
    Troa,
    Weighting,
    average_weights,
    cosine_similarity,
    lookahead_similarity,
    position_statistics,
)

SIMILARITIES = get_args(Similarity)
WEIGHTINGS = get_args(Weighting)
GRADIENT_SIMILARITIES = tuple(name for name in SIMILARITIES if name != "spatial")
NUM_TASKS, NUM_PARAMETERS = 4, 30


def make_troa(similarity: str = "cosine", initial_TT: Tensor | None = None, **settings: Any) -> Troa:
    return Troa(torch.eye(NUM_TASKS) if initial_TT is None else initial_TT, NUM_PARAMETERS, similarity, **settings)


def num_parts(similarity: str) -> int:
    return 2 if similarity in ("split", "fisher") else 1


def make_gradients(similarity: str, num_updates: int = 5, seed: int = 0) -> list[Tensor]:
    """(H,T,P) each, or the (T,B,N) magnitudes of "spatial": what all tasks share, what each has of its own, noise."""
    generator = torch.Generator().manual_seed(seed)
    if similarity == "spatial":
        steady_TBN = torch.rand(3, 25, generator=generator) + torch.rand(NUM_TASKS, 3, 25, generator=generator)
        return [steady_TBN + torch.rand(steady_TBN.shape, generator=generator) for _ in range(num_updates)]
    steady_TP = torch.randn(NUM_PARAMETERS, generator=generator)
    steady_TP = steady_TP + torch.randn(NUM_TASKS, NUM_PARAMETERS, generator=generator)
    shape = (num_parts(similarity), NUM_TASKS, NUM_PARAMETERS)
    return [steady_TP + torch.randn(shape, generator=generator) / 2 for _ in range(num_updates)]


def feed(troa: Troa, gradients: Sequence[Tensor]) -> Troa:
    for observed in gradients:
        troa.update(position_statistics(observed) if troa.similarity == "spatial" else observed)
    return troa


def tasks_of(similarity: str, gradients: Sequence[Tensor], tasks: Sequence[int]) -> list[Tensor]:
    """The same gradients with the tasks picked or in another order."""
    return [observed[tasks] if similarity == "spatial" else observed[:, tasks] for observed in gradients]


def naive_positions(source_BN: Tensor, target_BN: Tensor) -> tuple[float, int]:
    """Sum over images of the correlation over positions, and their number."""
    pairs = [torch.stack(pair) for pair in zip(source_BN, target_BN, strict=True)]
    pairs = [pair for pair in pairs if pair.isfinite().all() and (pair.std(dim=1) > 0).all()]
    return sum(torch.corrcoef(pair)[0, 1].item() for pair in pairs), len(pairs)


def naive_affinity(similarity: str, gradients: Sequence[Tensor], momentum: float, initial_TT: Tensor) -> Tensor:
    """Entry by entry; a task without a usable gradient in a part takes no part in what needs that part."""
    num_tasks = len(initial_TT)
    mean, seen = [torch.zeros(num_tasks, num_tasks, dtype=torch.float64) for _ in range(2)]
    fisher_HTP = torch.zeros(gradients[0].shape, dtype=torch.float64)
    for observed in gradients:
        values = observed.double()
        usable = values.isfinite().all(dim=-1) & (values != 0).any(dim=-1)
        if similarity == "fisher":
            for half, task in product(range(2), range(num_tasks)):
                if usable[half, task]:
                    share_P = values[half, task] ** 2 / (values[half, task] ** 2).sum()
                    fisher_HTP[half, task] = momentum * fisher_HTP[half, task] + (1 - momentum) * share_P
            values = fisher_HTP
        for s, t in product(range(num_tasks), repeat=2):
            if similarity == "spatial":
                total, num_images = naive_positions(values[s], values[t])
                found = total / num_images
            elif usable[0, s] and usable[-1, t]:
                dot = values[0, s] @ values[-1, t]
                if similarity == "lookahead":
                    found = (dot / values[0, t].square().sum()).clamp(0, 1)
                else:
                    found = dot / (values[0, s].norm() * values[-1, t].norm())
            else:
                continue
            mean[s, t] = momentum * mean[s, t] + (1 - momentum) * found
            seen[s, t] += 1
    return torch.where(seen > 0, (mean / (1 - momentum**seen)).clamp(0, 1), initial_TT.double()).float()


def off_diagonal(values_TT: Tensor) -> Tensor:
    return values_TT[~torch.eye(len(values_TT), dtype=torch.bool)]


class SharedNetwork(nn.Module):
    """A trunk that all tasks share, and a linear head for each."""

    def __init__(self, num_tasks: int, equal_heads: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(num_tasks))
        for head in self.heads if equal_heads else ():
            head.load_state_dict(self.heads[0].state_dict())

    def losses(self, inputs_BD: Tensor, targets_TB: Tensor) -> Tensor:
        """(T,B)."""
        shared = self.trunk(inputs_BD)
        return torch.stack([head(shared).squeeze(-1) for head in self.heads]).sub(targets_TB).square()

    def shared_gradients(self, losses_TB: Tensor, parts: int) -> Tensor:
        """(H,T,P)."""
        parameters = list(self.trunk.parameters())
        rows = []
        for loss_B in losses_TB.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 1):
            gradients = torch.autograd.grad(loss_B.mean(), parameters, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return torch.stack(rows).unflatten(0, (parts, -1))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("similarity", GRADIENT_SIMILARITIES)
def test_tasks_that_share_a_factor_of_the_input_are_closer_than_tasks_that_do_not(similarity: str, seed: int) -> None:
    torch.manual_seed(seed)
    # Tasks 0 and 1 want the factor that the first half of the input makes, task 2 that of the other half.
    projection_DF = torch.randn(2, 8, 2) / 8**0.5
    network = SharedNetwork(num_tasks=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    num_parameters = sum(parameter.numel() for parameter in network.trunk.parameters())
    troa = Troa(torch.zeros(3, 3), num_parameters, similarity)
    # They still learn at the end. Once only noise is left, the halves of a batch have no gradient in common.
    for _ in range(30):
        inputs_BD = torch.randn(256, 16)
        first_B, second_B = (
            (half @ projection).tanh().sum(dim=1)
            for half, projection in zip(inputs_BD.chunk(2, dim=1), projection_DF, strict=True)
        )
        targets_TB = torch.stack([first_B, first_B, second_B]) + 0.1 * torch.randn(3, 256)
        losses_TB = network.losses(inputs_BD, targets_TB)
        troa.update(network.shared_gradients(losses_TB, troa.num_parts))
        optimizer.zero_grad()
        losses_TB.mean(dim=1).sum().backward()
        optimizer.step()
    affinity = troa.affinity
    related = torch.stack([affinity[0, 1], affinity[1, 0]])
    unrelated = torch.stack([affinity[0, 2], affinity[2, 0], affinity[1, 2], affinity[2, 1]])
    assert related.min() > unrelated.max()


def affinity_of_two_losses(similarity: str, factor: float) -> Tensor:
    """Of a loss, and of `factor` times the same loss of an equal head; a big batch, so that its halves agree."""
    network = SharedNetwork(num_tasks=2, equal_heads=True)
    inputs_BD = torch.randn(4096, 16)
    losses_TB = network.losses(inputs_BD, inputs_BD[:, :4].sum(dim=1).tanh().expand(2, -1))
    gradients_HTP = network.shared_gradients(torch.tensor([[1.0], [factor]]) * losses_TB, num_parts(similarity))
    troa = Troa(torch.zeros(2, 2), gradients_HTP.shape[-1], similarity)
    troa.update(gradients_HTP)
    return troa.affinity


@pytest.mark.parametrize("similarity", GRADIENT_SIMILARITIES)
def test_identical_tasks_have_an_affinity_near_one(similarity: str) -> None:
    affinity = affinity_of_two_losses(similarity, factor=1.0)
    assert affinity.min() >= (0.9 if num_parts(similarity) == 2 else 1 - 1e-6)
    assert affinity.max() <= 1


@pytest.mark.parametrize("similarity", ["cosine", "split", "lookahead"])
def test_opposed_losses_have_no_affinity(similarity: str) -> None:
    affinity = affinity_of_two_losses(similarity, factor=-1.0)
    assert (off_diagonal(affinity) == 0).all()
    assert (affinity.diagonal() > 0.9).all()


def test_fisher_does_not_see_that_losses_are_opposed() -> None:
    # It asks which parameters a task moves, not where to: the square takes the sign away.
    assert affinity_of_two_losses("fisher", factor=-1.0).min() > 0.9


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_affinities_equal_those_of_explicit_loops(similarity: str, momentum: float) -> None:
    # The first task pulls against the others at first: running means are of signed values, clipped at the end.
    gradients = make_gradients(similarity)
    if similarity != "spatial":
        gradients[0][:, 0] *= -1
    for num_updates in (1, 2, 5):
        found = feed(make_troa(similarity, momentum=momentum), gradients[:num_updates]).affinity
        expected = naive_affinity(similarity, gradients[:num_updates], momentum, torch.eye(NUM_TASKS))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    last = feed(make_troa(similarity, momentum=momentum), gradients[-1:]).affinity
    assert torch.equal(found, last) == (momentum == 0)
    assert off_diagonal(expected).min() > 0.05, "nothing to tell right from wrong"
    assert off_diagonal(expected).std() > 0.01, "nothing to tell right from wrong"


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_tasks_in_another_order_give_the_matrix_in_that_order(similarity: str) -> None:
    gradients, order = make_gradients(similarity), [2, 0, 3, 1]
    affinity = feed(make_troa(similarity), gradients).affinity
    permuted = feed(make_troa(similarity), tasks_of(similarity, gradients, order)).affinity
    torch.testing.assert_close(permuted, affinity[order][:, order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_duplicated_task_is_closest_to_its_twin(similarity: str) -> None:
    gradients = tasks_of(similarity, make_gradients(similarity), [0, 1, 2, 1])
    affinity = feed(make_troa(similarity), gradients).affinity.fill_diagonal_(-1)
    for one, twin in ((1, 3), (3, 1)):
        assert affinity[one].argmax() == twin
        assert affinity[:, one].argmax() == twin
        assert affinity[one].topk(2).values.diff().abs() > 0.05, "a tie would pass as well"


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("rate", [0.1, 0.3, 2.0])
def test_mirror_without_entropy_is_the_update_of_tawt(rate: float, momentum: float) -> None:
    gradients = make_gradients("cosine", num_updates=12)
    for observed in gradients:
        observed[:, 0] *= -1  # negative cosines count as such
    troa = feed(make_troa(weighting="mirror", momentum=momentum, mirror_rate=rate, mirror_entropy=0.0), gradients)
    weights, mean = torch.full((NUM_TASKS, NUM_TASKS), 1 / NUM_TASKS), torch.zeros(NUM_TASKS, NUM_TASKS)
    for number, observed in enumerate(gradients, start=1):
        unit_TP = observed[0] / observed[0].norm(dim=1, keepdim=True)
        mean = momentum * mean + (1 - momentum) * unit_TP @ unit_TP.t()
        for t in range(NUM_TASKS):
            moved = weights[:, t] * torch.exp(rate * mean[:, t] / (1 - momentum**number))
            weights[:, t] = moved / moved.sum()
    torch.testing.assert_close(troa.weights, weights, rtol=0, atol=1e-6)
    assert weights.std() > 0.05, "they hardly moved"


@pytest.mark.parametrize("entropy", [0.2, 0.5, 1.0])
def test_mirror_with_entropy_converges_to_a_softmax_of_the_affinity(entropy: float) -> None:
    troa = make_troa(weighting="mirror", mirror_rate=0.4, mirror_entropy=entropy)
    feed(troa, make_gradients("cosine", num_updates=1) * 250)
    exponentials = torch.exp(troa.affinity / entropy)
    torch.testing.assert_close(troa.weights, exponentials / exponentials.sum(dim=0), rtol=0, atol=1e-6)


def test_the_controls_ignore_the_affinity() -> None:
    identity_TT, uniform_TT = torch.eye(NUM_TASKS), torch.full((NUM_TASKS, NUM_TASKS), 1 / NUM_TASKS)
    first_TT = identity_TT[:1].t().expand(-1, NUM_TASKS)
    for weighting, expected in {"identity": identity_TT, "uniform": uniform_TT, "common": first_TT}.items():
        troa = feed(make_troa(weighting=weighting), make_gradients("cosine"))
        torch.testing.assert_close(troa.weights, expected, rtol=0, atol=0)
        assert torch.equal(troa.affinity, feed(make_troa(), make_gradients("cosine")).affinity)


def test_average_weights_are_columns_that_sum_to_one_and_a_column_of_zeros_counts_as_identity() -> None:
    affinity = torch.tensor([[0.9, 0.0, 0.2], [0.3, 0.0, 0.0], [0.6, 0.0, 0.6]])
    expected = torch.tensor([[0.5, 0.0, 0.25], [0.3 / 1.8, 1.0, 0.0], [0.6 / 1.8, 0.0, 0.75]])
    torch.testing.assert_close(average_weights(affinity), expected)
    torch.testing.assert_close(make_troa(initial_TT=affinity).weights, expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_task_without_a_usable_gradient_keeps_its_entries_and_the_others_move_without_it(
    similarity: str, value: float
) -> None:
    before, after, skipped, others = make_gradients(similarity, 3), make_gradients(similarity, 2, seed=1), 2, [0, 1, 3]
    for observed in after:
        of_task = observed[skipped] if similarity == "spatial" else observed[:, skipped]
        # One number that is not finite is enough.
        of_task[..., slice(1) if value else slice(None)] = value
    troa = feed(make_troa(similarity, weighting="mirror"), before)
    names = ("affinity", "mean", "num_observed", "weights", *(("fisher",) if similarity == "fisher" else ()))
    kept = {name: getattr(troa, name).clone() for name in names}
    feed(troa, after)
    for name in names:
        assert torch.equal(getattr(troa, name)[:, skipped], kept[name][:, skipped]), name
    for name in ("affinity", "mean", "num_observed"):
        assert torch.equal(getattr(troa, name)[skipped], kept[name][skipped]), name
    assert troa.num_updates.tolist() == [5, 5, 3, 5]
    assert troa.num_skipped.tolist() == [0, 0, 2, 0]
    alone = feed(make_troa(similarity, torch.eye(3)), tasks_of(similarity, before + after, others))
    torch.testing.assert_close(troa.affinity[others][:, others], alone.affinity, rtol=0, atol=1e-6)
    assert (alone.affinity - kept["affinity"][others][:, others]).abs().max() > 0.01, "they hardly moved"


@pytest.mark.parametrize("similarity", ["split", "fisher"])
def test_a_task_that_only_the_first_half_shows_moves_as_a_source_alone(similarity: str) -> None:
    gradients, task = make_gradients(similarity), 1
    kept = feed(make_troa(similarity), gradients[:-1]).affinity
    gradients[-1][1, task] = 0.0
    affinity = feed(make_troa(similarity), gradients).affinity
    expected = naive_affinity(similarity, gradients, 0.9, torch.eye(NUM_TASKS))
    torch.testing.assert_close(affinity, expected, rtol=0, atol=2e-6)
    assert torch.equal(affinity[:, task], kept[:, task])
    assert (affinity[task] != kept[task]).tolist() == [True, False, True, True]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_entries_of_a_task_never_seen_keep_the_initial_affinity(similarity: str) -> None:
    initial_TT, gradients = torch.rand(NUM_TASKS, NUM_TASKS), make_gradients(similarity)
    for observed in gradients:
        (observed[0] if similarity == "spatial" else observed[:, 0]).zero_()
    affinity = feed(make_troa(similarity, initial_TT), gradients).affinity
    assert torch.equal(affinity[0], initial_TT[0])
    assert torch.equal(affinity[:, 0], initial_TT[:, 0])
    assert (affinity[1:, 1:] != initial_TT[1:, 1:]).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_restored_state_goes_on_as_if_it_had_not_stopped(similarity: str, weighting: str) -> None:
    gradients = make_gradients(similarity, num_updates=6)
    stopped = feed(make_troa(similarity, weighting=weighting), gradients[:3])
    restored = make_troa(similarity, torch.zeros(NUM_TASKS, NUM_TASKS), weighting=weighting)
    restored.load_state_dict(stopped.state_dict())
    whole = feed(make_troa(similarity, weighting=weighting), gradients)
    feed(restored, gradients[3:])
    for name, buffer in whole.state_dict().items():
        assert torch.equal(restored.state_dict()[name], buffer), name
    assert torch.equal(restored.affinity, whole.affinity)
    assert torch.equal(restored.weights, whole.weights)
    for troa in (make_troa(similarity, weighting=weighting), whole):
        torch.testing.assert_close(troa.weights.sum(dim=0), torch.ones(NUM_TASKS))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_in_eval_mode_nothing_changes(similarity: str) -> None:
    gradients = make_gradients(similarity)
    troa = feed(make_troa(similarity, weighting="mirror"), gradients[:2]).eval()
    before = {name: buffer.clone() for name, buffer in troa.state_dict().items()}
    feed(troa, gradients[2:])
    for name, buffer in troa.state_dict().items():
        assert torch.equal(buffer, before[name]), name
    feed(troa.train(), gradients[2:])
    assert not torch.equal(troa.mean, before["mean"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("similarity", GRADIENT_SIMILARITIES)
def test_affinities_and_weights_are_float32_whatever_comes_in(similarity: str, dtype: torch.dtype) -> None:
    troa = make_troa(similarity, torch.eye(NUM_TASKS, dtype=dtype), weighting="mirror")
    rounded = [observed.to(dtype) for observed in make_gradients(similarity)]
    feed(troa, rounded)
    assert troa.affinity.dtype == troa.weights.dtype == troa.mean.dtype == torch.float32
    same = feed(make_troa(similarity), [observed.float() for observed in rounded])
    assert torch.equal(troa.affinity, same.affinity)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"similarity": "dot"}, ["'dot'", *SIMILARITIES]),
        ({"weighting": "softmax"}, ["'softmax'", *WEIGHTINGS]),
        ({"momentum": 1.0}, ["1.0", "at least 0 and less than 1"]),
        ({"momentum": -0.1}, ["-0.1", "at least 0 and less than 1"]),
        ({"mirror_rate": 0.0}, ["mirror_rate is 0.0", "must be positive"]),
        ({"mirror_entropy": -0.5}, ["mirror_entropy -0.5", "at least 0"]),
        ({"mirror_rate": 3.0, "mirror_entropy": 0.5}, ["3.0", "0.5", "product at most 1"]),
    ],
)
def test_a_wrong_setting_raises_an_error_that_says_what_is_allowed(settings: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make_troa(**settings)
    assert all(part in str(error.value) for part in named), str(error.value)


def test_position_statistics_are_sums_of_correlations_over_images_that_both_tasks_have() -> None:
    magnitudes_TBN = make_gradients("spatial", num_updates=1)[0].repeat(1, 2, 1)
    magnitudes_TBN += torch.rand(magnitudes_TBN.shape)
    magnitudes_TBN[0, 1], magnitudes_TBN[2, :4], magnitudes_TBN[3, 5, 7] = 0.0, 0.0, float("nan")
    found = position_statistics(magnitudes_TBN)
    for s, t in product(range(NUM_TASKS), repeat=2):
        expected = torch.tensor(naive_positions(magnitudes_TBN[s], magnitudes_TBN[t]))
        torch.testing.assert_close(found[:, s, t], expected, rtol=0, atol=1e-5)
    assert found[1].diagonal().tolist() == [5, 6, 2, 5]
    shards = position_statistics(magnitudes_TBN[:, :2]) + position_statistics(magnitudes_TBN[:, 2:])
    torch.testing.assert_close(shards, found, rtol=0, atol=1e-5)


def test_an_image_in_which_a_gradient_is_the_same_everywhere_does_not_count() -> None:
    magnitudes_TBN = torch.rand(2, 1, 49)
    magnitudes_TBN[1] = 0.1
    assert position_statistics(magnitudes_TBN)[1].tolist() == [[1, 0], [0, 0]]


def test_lookahead_is_the_share_of_the_targets_step_and_not_symmetric() -> None:
    gradients_TP = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 3.0], [0.0, 0.0]])
    expected = [[1.0, 1.0, 0.0, 0.0], [0.5, 1.0, 0.2, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(lookahead_similarity(gradients_TP), torch.tensor(expected))


def test_the_cosine_of_a_row_of_zeros_is_zero_and_small_rows_count_like_large_ones() -> None:
    rows_TP = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0]])
    expected = [[1.0, 0.0, 0.6], [0.0, 0.0, 0.0], [0.6, 0.0, 1.0]]
    torch.testing.assert_close(cosine_similarity(rows_TP, rows_TP), torch.tensor(expected))
