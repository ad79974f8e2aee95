"""Losses against loops over pixels, and the promises they share: partial labels, absent labels, float32."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from mt_adapters import losses

NAN = float("nan")
NUM_LABELS = 4


def semseg_batch(generator):
    logits = torch.randn(3, NUM_LABELS, 4, 5, generator=generator)
    labels = torch.randint(NUM_LABELS, (3, 4, 5), generator=generator)
    labels[:, 0, :3] = 255
    return logits, labels


def depth_batch(generator):
    target = 0.5 + 4 * torch.rand(3, 4, 5, generator=generator)
    prediction = target + torch.randn(3, 4, 5, generator=generator)
    target[:, 0, :2] = 0
    target[:, 1, 1] = NAN
    return prediction, target


def normals_batch(generator):
    target = F.normalize(torch.randn(3, 3, 4, 5, generator=generator), dim=1)
    target[:, :, 2, :2] = 0
    return torch.randn(3, 3, 4, 5, generator=generator), target


def edges_batch(generator):
    target = torch.rand(3, 4, 5, generator=generator) ** 2
    target[:, 3, 1:] = NAN
    return torch.randn(3, 4, 5, generator=generator), target


def no_label(target, value):
    return torch.full_like(target, value)


def pixels(prediction, target):
    """(prediction, target) of every pixel that has a label, as Python floats."""
    pairs = zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
    return [(p, t) for p, t in pairs if not math.isnan(t)]


def depth_pixels(prediction, target):
    return [(p, t) for p, t in pixels(prediction, target) if t != 0]


def loop_cross_entropy(logits, labels):
    terms = []
    for b, h, w in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        label = int(labels[b, h, w])
        if label != 255:
            scores = logits[b, :, h, w].tolist()
            terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    return sum(terms) / len(terms)


def loop_berhu(prediction, target):
    residuals = [abs(p - t) for p, t in depth_pixels(prediction, target)]
    c = 0.2 * max(residuals)
    return sum(r if r <= c else (r * r + c * c) / (2 * c) for r in residuals) / len(residuals)


def loop_depth_l1(prediction, target):
    residuals = [abs(p - t) for p, t in depth_pixels(prediction, target)]
    return sum(residuals) / len(residuals)


def loop_scale_invariant_log(prediction, target, weight=0.5):
    errors = []
    for image, truth in zip(prediction, target, strict=True):
        d = [math.log(max(p, 1e-3)) - math.log(t) for p, t in depth_pixels(image, truth)]
        if d:
            errors.append(sum(x * x for x in d) / len(d) - weight * sum(d) ** 2 / len(d) ** 2)
    return sum(errors) / len(errors)


def loop_cosine_distance(prediction, target):
    terms = []
    for b, h, w in torch.cartesian_prod(*map(torch.arange, target[:, 0].shape)).tolist():
        p, t = prediction[b, :, h, w].tolist(), target[b, :, h, w].tolist()
        if any(t):
            dot = sum(x * y for x, y in zip(p, t, strict=True))
            terms.append(1 - dot / math.hypot(*p))
    return sum(terms) / len(terms)


def loop_balanced_bce(logits, target):
    pairs = pixels(logits, target)
    share = sum(t for _, t in pairs) / len(pairs)
    terms = []
    for x, t in pairs:
        probability = 1 / (1 + math.exp(-x))
        terms.append(-(1 - share) * t * math.log(probability) - share * (1 - t) * math.log(1 - probability))
    return sum(terms) / len(terms)


def loop_edge_l1(prediction, target):
    pairs = pixels(prediction, target)
    return sum(abs(p - t) for p, t in pairs) / len(pairs)


# loss, its loop, a batch for it, the values of "no label"
ALL = [
    pytest.param(losses.cross_entropy, loop_cross_entropy, semseg_batch, [255], id="cross_entropy"),
    pytest.param(losses.berhu, loop_berhu, depth_batch, [0, NAN], id="berhu"),
    pytest.param(losses.depth_l1, loop_depth_l1, depth_batch, [0, NAN], id="depth_l1"),
    pytest.param(losses.scale_invariant_log, loop_scale_invariant_log, depth_batch, [0, NAN], id="silog"),
    pytest.param(losses.cosine_distance, loop_cosine_distance, normals_batch, [0], id="cosine_distance"),
    pytest.param(losses.balanced_bce, loop_balanced_bce, edges_batch, [NAN], id="balanced_bce"),
    pytest.param(losses.edge_l1, loop_edge_l1, edges_batch, [NAN], id="edge_l1"),
]
every_loss = pytest.mark.parametrize(("loss", "loop", "make_batch", "no_labels"), ALL)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@every_loss
def test_a_loss_equals_a_loop_over_labelled_pixels(loss, loop, make_batch, no_labels, generator):
    prediction, target = make_batch(generator)
    assert loss(prediction, target).item() == pytest.approx(loop(prediction, target), rel=1e-5)


@every_loss
def test_an_unlabelled_image_changes_neither_loss_nor_gradient(loss, loop, make_batch, no_labels, generator):
    prediction, target = make_batch(generator)
    expected_input = prediction.clone().requires_grad_()
    expected = loss(expected_input, target)
    expected.backward()
    for value in no_labels:
        extra = torch.randn(prediction[:1].shape, generator=generator)
        longer = torch.cat([prediction, extra]).requires_grad_()
        result = loss(longer, torch.cat([target, no_label(target[:1], value)]))
        result.backward()
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(longer.grad[:-1], expected_input.grad)
        assert not longer.grad[-1].any()


@every_loss
def test_with_no_label_at_all_loss_and_gradient_are_exactly_zero(loss, loop, make_batch, no_labels, generator):
    for value in no_labels:
        prediction, target = make_batch(generator)
        prediction.requires_grad_()
        result = loss(prediction, no_label(target, value))
        result.backward()
        assert result.item() == 0
        assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@every_loss
@pytest.mark.parametrize("broken", [NAN, math.inf, -math.inf])
def test_a_broken_prediction_without_a_label_does_no_harm(loss, loop, make_batch, no_labels, broken, generator):
    prediction, target = make_batch(generator)
    target[0] = no_labels[-1]
    expected = loss(prediction, target)
    prediction[0] = broken
    prediction.requires_grad_()
    result = loss(prediction, target)
    result.backward()
    assert torch.equal(result, expected)
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[0].any()
    assert prediction.grad[1:].any()


@every_loss
def test_a_loss_is_float32_for_every_dtype_and_under_autocast(loss, loop, make_batch, no_labels, generator):
    prediction, target = make_batch(generator)
    exact = loss(prediction, target)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert loss(prediction.to(dtype), target).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(prediction, target)
        assert loss(prediction.bfloat16(), target).dtype == torch.float32
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, exact)


@every_loss
def test_the_gradient_matches_finite_differences(loss, loop, make_batch, no_labels, generator):
    prediction, target = make_batch(generator)
    if loss is losses.scale_invariant_log:
        prediction = prediction.abs() + 0.1
    if loss is losses.berhu:
        # c is a constant to the gradient, so the check leaves the largest residual alone.
        target = target.where(target > 0, 0.0)
        prediction[2, 3, 4] = target[2, 3, 4] + 20
    prediction.requires_grad_()
    loss(prediction, target).backward()
    step = 1e-2
    for index in [(0, 2, 3), (1, 2, 4), (2, 1, 3)]:
        index = (index[0], 0, *index[1:]) if prediction.ndim == 4 else index
        values = []
        for sign in (1, -1):
            moved = prediction.detach().clone()
            moved[index] += sign * step
            values.append(loop(moved, target))
        assert prediction.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-4)


@every_loss
def test_shapes_that_would_broadcast_are_refused(loss, loop, make_batch, no_labels, generator):
    prediction, target = make_batch(generator)
    with pytest.raises(ValueError, match="shape"):
        loss(prediction, target.unsqueeze(1))


def test_normals_need_three_channels():
    with pytest.raises(ValueError, match=r"\(B,3,H,W\)"):
        losses.cosine_distance(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 4))


def test_berhu_is_linear_below_c_and_quadratic_above_it():
    residual = torch.tensor([[[0.5, 1.0, 2.0, 10.0]]])
    target = torch.ones_like(residual)
    # c = 2: 0.5, 1 and 2 stay as they are and 10 becomes (100 + 4) / 4.
    assert losses.berhu(target + residual, target).item() == pytest.approx((0.5 + 1 + 2 + 26) / 4)


def test_berhu_sends_no_gradient_through_c():
    target = torch.ones(1, 1, 2)
    prediction = torch.tensor([[[2.0, 11.0]]], requires_grad=True)
    losses.berhu(prediction, target).backward()
    # c = 2: residual 1 is linear, residual 10 has the slope 10 / 2; each is divided by the two pixels.
    torch.testing.assert_close(prediction.grad, torch.tensor([[[0.5, 2.5]]]))


@pytest.mark.parametrize("loss", list(losses.DEPTH_LOSSES.values()), ids=list(losses.DEPTH_LOSSES))
def test_a_perfect_depth_has_no_loss_and_a_finite_gradient(loss):
    prediction = torch.full((1, 2, 2), 2.0, requires_grad=True)
    result = loss(prediction, torch.full((1, 2, 2), 2.0))
    result.backward()
    assert result.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_scale_invariant_log_with_full_weight_ignores_the_scale_of_each_image(generator):
    _, target = depth_batch(generator)
    scales = torch.tensor([0.5, 2.0, 3.0]).view(3, 1, 1)
    assert losses.scale_invariant_log(target.nan_to_num() * scales, target, weight=1).item() == pytest.approx(
        0, abs=1e-6
    )
    assert losses.scale_invariant_log(target.nan_to_num() * scales, target, weight=0.85).item() > 0.05


def test_scale_invariant_log_of_a_negative_prediction_is_finite():
    prediction = torch.tensor([[[-1.0, 2.0]]], requires_grad=True)
    result = losses.scale_invariant_log(prediction, torch.ones(1, 1, 2))
    result.backward()
    assert result.item() == pytest.approx(loop_scale_invariant_log(prediction.detach(), torch.ones(1, 1, 2)), rel=1e-5)
    assert prediction.grad.isfinite().all()


def test_cosine_distance_ignores_the_length_of_the_prediction(generator):
    prediction, target = normals_batch(generator)
    torch.testing.assert_close(
        losses.cosine_distance(7 * prediction, target), losses.cosine_distance(prediction, target)
    )
    assert losses.cosine_distance(3 * target, target).item() == pytest.approx(0, abs=1e-6)
    assert losses.cosine_distance(-target, target).item() == pytest.approx(2)


def test_a_prediction_of_zero_normals_has_a_bounded_gradient():
    prediction = torch.zeros(1, 3, 1, 1, requires_grad=True)
    target = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    result = losses.cosine_distance(prediction, target)
    result.backward()
    assert result.item() == 1
    torch.testing.assert_close(prediction.grad, -1e3 * target)


def test_edges_and_the_rest_weigh_the_same_in_balanced_bce():
    target = torch.zeros(1, 4, 5)
    target[0, 0, 0] = 1
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    losses.balanced_bce(logits, target).backward()
    edge = logits.grad[target == 1].sum()
    rest = logits.grad[target == 0].sum()
    torch.testing.assert_close(edge, -rest)
    assert edge < 0


def test_balanced_bce_is_finite_for_very_sure_logits():
    logits = torch.tensor([[[-1e4, 1e4]]], requires_grad=True)
    result = losses.balanced_bce(logits, torch.tensor([[[1.0, 0.0]]]))
    result.backward()
    assert result.item() == pytest.approx(0.5 * 1e4)
    assert logits.grad.isfinite().all()


def test_the_tables_name_the_losses():
    assert losses.DEPTH_LOSSES == {
        "berhu": losses.berhu,
        "l1": losses.depth_l1,
        "silog": losses.scale_invariant_log,
    }
    assert losses.EDGE_LOSSES == {"balanced_bce": losses.balanced_bce, "l1": losses.edge_l1}


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(losses)
    assert result.attempted > 0
    assert result.failed == 0
