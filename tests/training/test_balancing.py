"""Every balancing weighs losses or gradients as its equations say, and the same on every process and after a resume.

Shape suffixes: T tasks, P parameters.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mt_adapters.training.balancing import GRADIENT_BALANCING, LOSS_BALANCING, GradientBalancing, get_balancing


def labelled(*tasks: bool) -> Tensor:
    return torch.tensor(tasks)


def gradient_balancing(name: str, num_tasks: int, settings: dict[str, Any] | None = None) -> GradientBalancing:
    balancing = get_balancing(name, num_tasks, settings)
    assert isinstance(balancing, GradientBalancing)
    return balancing


def similar_gradients(num_tasks: int = 4) -> Tensor:
    return torch.randn(50) + 0.01 * torch.randn(num_tasks, 50)


def opposed_gradients() -> Tensor:
    """Two, whose cosine is about -0.8."""
    first_P = torch.randn(200)
    return torch.stack([first_P, 1.5 * (0.75 * torch.randn(200) - first_P)])


@pytest.mark.parametrize("name", [*LOSS_BALANCING, *GRADIENT_BALANCING])
def test_a_balancing_says_what_it_needs_and_gives_a_factor_per_task(name: str) -> None:
    balancing = get_balancing(name, num_tasks=3)
    assert balancing.needs_gradients == (name in GRADIENT_BALANCING)
    assert balancing.needs_losses == (name in ("uncertainty", "dwa"))
    factors_T = balancing.factors(step=0)
    assert factors_T.dtype == torch.float32
    assert factors_T.shape == (3,)
    if name != "random":
        torch.testing.assert_close(factors_T, torch.ones(3), rtol=0, atol=0)


def test_fixed_factors_stay_one_whatever_the_losses() -> None:
    balancing = get_balancing("fixed", num_tasks=2)
    balancing.observe(torch.tensor([1.0, 100.0]), labelled(True, True))
    assert balancing.factors(step=7).tolist() == [1, 1]
    assert not balancing.state_dict()


def test_uncertainty_gives_the_gradient_of_its_loss_and_none_to_tasks_without_labels() -> None:
    balancing = get_balancing("uncertainty", num_tasks=3)
    start_T, losses_T = torch.tensor([0.5, -1.0, 0.2]), torch.tensor([2.0, 0.3, float("nan")])
    balancing.log_variances.data.copy_(start_T)
    torch.testing.assert_close(balancing.factors(step=0), torch.exp(-start_T))
    balancing.observe(losses_T, labelled(True, True, False))
    log_variances_T = start_T.clone().requires_grad_()
    (torch.exp(-log_variances_T[:2]) * losses_T[:2] + log_variances_T[:2]).sum().backward()
    torch.testing.assert_close(balancing.log_variances.grad, log_variances_T.grad)
    assert balancing.log_variances.grad[2] == 0
    torch.optim.SGD(balancing.parameters(), lr=0.1).step()
    assert balancing.log_variances[2] == start_T[2]
    assert (balancing.log_variances[:2] != start_T[:2]).all()


def test_uncertainty_ends_at_the_logarithm_of_a_steady_loss() -> None:
    balancing = get_balancing("uncertainty", num_tasks=2)
    optimizer = torch.optim.SGD(balancing.parameters(), lr=0.3)
    for _ in range(100):
        balancing.observe(torch.tensor([4.0, 0.5]), labelled(True, True))
        optimizer.step()
    torch.testing.assert_close(balancing.factors(step=0), torch.tensor([0.25, 2.0]), rtol=1e-4, atol=0)


WINDOW, TEMPERATURE = 3, 1.5


def make_losses(num_windows: int) -> tuple[Tensor, Tensor]:
    """Losses and whether there are labels, (windows, steps, T); task 0 has none in window 2 and task 1 some in all."""
    losses = torch.rand(num_windows, WINDOW, 3) + 0.5
    labels = torch.ones_like(losses, dtype=torch.bool)
    labels[2, :, 0] = labels[:, 0, 1] = False
    return losses.where(labels, float("nan")), labels


def naive_dwa(losses: Tensor, labels: Tensor) -> Tensor:
    """Factors after some complete windows: of each task the means of the windows that had labels, as one list."""
    ratios = []
    for task in range(3):
        means = []
        for window in range(len(losses)):
            seen = [losses[window, i, task].item() for i in range(WINDOW) if labels[window, i, task]]
            means.append(sum(seen) / len(seen) if seen else means[-1])
        ratios.append(means[-1] / means[-2] if len(means) > 1 else 1.0)
    exponentials = torch.tensor(ratios).div(TEMPERATURE).exp()
    return 3 * exponentials / exponentials.sum()


def test_dwa_equals_a_loop_over_windows() -> None:
    balancing = get_balancing("dwa", 3, {"window": WINDOW, "temperature": TEMPERATURE})
    losses, labels = make_losses(num_windows=5)
    expected_T = torch.ones(3)
    for window in range(5):
        for i in range(WINDOW):
            # Also in the midst of a window the factors are those of the last complete ones.
            torch.testing.assert_close(balancing.factors(step=0), expected_T)
            balancing.observe(losses[window, i], labels[window, i])
        expected_T = naive_dwa(losses[: window + 1], labels[: window + 1])
        assert (window >= 1) == (expected_T.std() > 0.01), "the first two windows give ones, later ones do not"
    torch.testing.assert_close(balancing.factors(step=0), expected_T)


def test_dwa_goes_on_from_a_state_in_the_midst_of_a_window() -> None:
    settings = {"window": WINDOW, "temperature": TEMPERATURE}
    whole, stopped, restored = (get_balancing("dwa", 3, settings) for _ in range(3))
    losses, labels = (values.flatten(0, 1) for values in make_losses(num_windows=5))
    for step in range(15):
        whole.observe(losses[step], labels[step])
        if step == 7:
            restored.load_state_dict(stopped.state_dict())
        (stopped if step < 7 else restored).observe(losses[step], labels[step])
    assert not torch.equal(whole.factors(step=0), torch.ones(3))
    assert torch.equal(restored.factors(step=0), whole.factors(step=0))
    for name, buffer in whole.state_dict().items():
        assert torch.equal(restored.state_dict()[name], buffer), name


@pytest.mark.parametrize("settings", [{"window": 0}, {"temperature": 0.0}])
def test_dwa_says_what_its_settings_may_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the window is at least 1, the temperature positive"):
        get_balancing("dwa", 2, settings)


def test_random_factors_depend_on_the_step_alone() -> None:
    state = torch.get_rng_state()
    drawn = torch.stack([get_balancing("random", num_tasks=4).factors(step) for step in range(1000)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = get_balancing("random", num_tasks=4)
    assert torch.equal(torch.stack([again.factors(step) for step in reversed(range(1000))]).flip(0), drawn)
    assert len(drawn.unique(dim=0)) == 1000
    torch.testing.assert_close(drawn.sum(dim=1), torch.full((1000,), 4.0))
    # T softmax of a normal: no task is preferred, and logarithms differ by normals of variance 2.
    torch.testing.assert_close(drawn.mean(dim=0), torch.ones(4), rtol=0, atol=0.1)
    torch.testing.assert_close((drawn[:, 0] / drawn[:, 1]).log().var(), torch.tensor(2.0), rtol=0, atol=0.4)


@pytest.mark.parametrize("name", GRADIENT_BALANCING)
def test_gradients_that_agree_give_about_their_sum(name: str) -> None:
    gradients_TP = similar_gradients()
    step_P = gradient_balancing(name, num_tasks=4).aggregate(gradients_TP, step=0)
    expected_P = gradients_TP.sum(dim=0)
    if name == "aligned_mtl":
        # All principal components are made as long as the shortest: gradients that agree only nearly give little.
        left, lengths, right = torch.linalg.svd(gradients_TP, full_matrices=False)
        expected_P = lengths[-1] * (left @ right).sum(dim=0)
    if name == "cagrad":
        expected_P = (1 + 0.5) * expected_P
    assert (step_P - expected_P).norm() <= 0.02 * expected_P.norm()


@pytest.mark.parametrize("name", GRADIENT_BALANCING)
def test_equal_gradients_give_their_sum(name: str) -> None:
    gradients_TP = torch.randn(50).expand(4, -1)
    step_P = gradient_balancing(name, num_tasks=4).aggregate(gradients_TP, step=0)
    expected_P = (1.5 if name == "cagrad" else 1.0) * gradients_TP.sum(dim=0)
    torch.testing.assert_close(step_P, expected_P, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", GRADIENT_BALANCING)
def test_the_same_step_gives_the_same_bits_and_leaves_the_global_generator_alone(name: str) -> None:
    gradients_TP = torch.randn(4, 50)
    first = gradient_balancing(name, num_tasks=4).aggregate(gradients_TP, step=3)
    assert first.dtype == torch.float32
    assert first.shape == (50,)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = gradient_balancing(name, num_tasks=4)
    again.aggregate(gradients_TP, step=4)
    assert torch.equal(again.aggregate(gradients_TP, step=3), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["graddrop", "pcgrad"])
def test_what_is_drawn_differs_from_step_to_step(name: str) -> None:
    balancing, gradients_TP = gradient_balancing(name, num_tasks=4), torch.randn(4, 50)
    gradients_TP[0] = -gradients_TP[1:].sum(dim=0) + 0.3 * gradients_TP[0]
    steps = torch.stack([balancing.aggregate(gradients_TP, step) for step in range(20)])
    assert len(steps.unique(dim=0)) > 2


@pytest.mark.parametrize("name", ["pcgrad", "upgrad", "mgda"])
def test_a_step_out_of_two_opposed_gradients_hurts_no_task(name: str) -> None:
    gradients_TP = opposed_gradients()
    assert (gradients_TP @ gradients_TP.sum(dim=0)).min() < -1, "their sum hurts one"
    step_P = gradient_balancing(name, num_tasks=2).aggregate(gradients_TP, step=0)
    assert (gradients_TP @ step_P).min() >= -1e-5
    assert step_P.norm() > 0.1 * gradients_TP.norm()


@pytest.mark.parametrize("name", GRADIENT_BALANCING)
def test_small_gradients_give_the_step_of_large_ones_only_smaller(name: str) -> None:
    gradients_TP, balancing = opposed_gradients(), gradient_balancing(name, num_tasks=2)
    expected_P = balancing.aggregate(gradients_TP, step=0)
    step_P = balancing.aggregate(1e-4 * gradients_TP, step=0) / 1e-4
    assert (step_P - expected_P).norm() <= 1e-3 * expected_P.norm()


@pytest.mark.parametrize("num_others", [1, 3])
@pytest.mark.parametrize("name", GRADIENT_BALANCING)
def test_a_task_without_labels_leaves_the_step_to_the_others(name: str, num_others: int) -> None:
    gradients_TP = torch.randn(num_others, 50) + torch.randn(50)
    expected_P = gradient_balancing(name, num_others).aggregate(gradients_TP, step=0)
    with_zeros_TP = torch.cat([gradients_TP, torch.zeros(1, 50)])
    step_P = gradient_balancing(name, num_others + 1).aggregate(with_zeros_TP, step=0)
    torch.testing.assert_close(step_P, expected_P)
    if num_others == 1:
        expected_P = (1.5 if name == "cagrad" else 1.0) * gradients_TP[0]
        torch.testing.assert_close(step_P, expected_P, rtol=1e-3, atol=1e-3)


def test_no_gradients_at_all_give_no_step() -> None:
    for name in GRADIENT_BALANCING:
        assert not gradient_balancing(name, num_tasks=4).aggregate(torch.zeros(4, 50), step=0).any(), name


@pytest.mark.parametrize("c", [0.0, 0.1, 0.9])
def test_settings_reach_the_aggregator(c: float) -> None:
    gradients_TP = similar_gradients()
    step_P = gradient_balancing("cagrad", 4, {"c": c}).aggregate(gradients_TP, step=0)
    torch.testing.assert_close(step_P, (1 + c) * gradients_TP.sum(dim=0), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("name", ["Fixed", "gradnorm"])
def test_an_unknown_name_raises_an_error_with_all_that_are_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown balancing '{name}'") as error:
        get_balancing(name, num_tasks=2)
    assert all(f"'{known}'" in str(error.value) for known in [*LOSS_BALANCING, *GRADIENT_BALANCING])


@pytest.mark.parametrize("name", [*LOSS_BALANCING, *GRADIENT_BALANCING])
def test_an_unknown_setting_raises_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"balancing '{name}' does not take the settings.*wrong"):
        get_balancing(name, 2, {"wrong": 1})


def test_without_torchjd_gradient_balancing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is what Python takes for "not there".
    for module in ("torchjd", "torchjd.aggregation"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in GRADIENT_BALANCING:
        with pytest.raises(ValueError, match=r'pip install "mt-adapters\[balancing\]"'):
            get_balancing(name, num_tasks=2)
    for name in LOSS_BALANCING:
        get_balancing(name, num_tasks=2)


def test_without_a_solver_of_torchjd_gradient_balancing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_a_solver(**settings: Any) -> None:
        raise ImportError("CAGrad requires ['clarabel'] to be installed")

    aggregation: Any = ModuleType("aggregation")
    aggregation.CAGrad = needs_a_solver
    monkeypatch.setattr(importlib, "import_module", {"torchjd.aggregation": aggregation}.__getitem__)
    with pytest.raises(ValueError, match=r'pip install "mt-adapters\[balancing\]".*clarabel'):
        get_balancing("cagrad", num_tasks=2)
