"""One optimiser step of a multitask model: task by task, so that each task's gradient can be seen at no extra cost.

After the fan-out the graphs of the tasks have nothing in common. Each task runs forward and backward by itself and is
forgotten before the next one starts: one backward pass in all, the memory of one task, and T gradients on the way.

Shape suffixes: A batches of a step, T tasks, P parameters, H parts of a batch (1 or 2 halves), B images, N positions,
K channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mt_adapters.models.vta.modeling_vta import SharedFeatures, VtaModel
from mt_adapters.tasks import Task
from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.balancing import Balancing, GradientBalancing, get_balancing
from mt_adapters.troa import Troa, position_statistics

# Ways to run on several devices in which no process holds all parameters.
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class GradientSums:
    """Gradients of some parameters, (H,T,P) float32, summed over the passes of one optimiser step."""

    def __init__(self, parameters: Sequence[nn.Parameter], num_parts: int, num_tasks: int) -> None:
        self.parameters = list(parameters)
        self.num_parts = num_parts
        num_parameters = sum(parameter.numel() for parameter in parameters)
        self.values_HTP = torch.zeros(num_parts, num_tasks, num_parameters, device=parameters[0].device)

    def add(self, part: int, task: int) -> None:
        """Adds what the parameters hold now."""
        pieces = self.values_HTP[part % self.num_parts, task].split([p.numel() for p in self.parameters])
        for piece, parameter in zip(pieces, self.parameters, strict=True):
            if parameter.grad is not None:
                piece += parameter.grad.flatten()

    def scatter(self, values_P: Tensor) -> None:
        """Makes a vector the gradient that the parameters hold."""
        pieces = values_P.split([parameter.numel() for parameter in self.parameters])
        for piece, parameter in zip(pieces, self.parameters, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)


class MultitaskStep:
    """Forward and backward passes of the training, with TROA and balancing.

    Call `begin`, then `backward` for each batch of an optimiser step, then `finish`; clip; then `observe`; then step
    the optimiser.

    With one process each task runs by itself. Behind a wrapper (DDP), and with fan_out="batched", all tasks share one
    backward pass through the wrapper, except in steps that need the tasks' gradients: there the tasks run one by one
    on every process, and the gradients are averaged at the end of the step.

    Args:
        wrapped: what Accelerate made of the model.

    Raises:
        ValueError: if a setting of `arguments` is unknown or not allowed.
    """

    def __init__(
        self,
        model: VtaModel,
        wrapped: nn.Module,
        accelerator: Accelerator,
        arguments: MultitaskArguments,
    ) -> None:
        self.model, self.wrapped, self.accelerator = model, wrapped, accelerator
        num_tasks = len(model.tasks)
        self.task_weights_T = torch.tensor([task.weight for task in model.tasks])
        self.balancing: Balancing = get_balancing(arguments.balancing, num_tasks, arguments.balancing_settings)
        self.interval = arguments.affinity_interval
        self.troa: Troa | None = None
        self.affinity_parameters: list[nn.Parameter] = []
        # Where only a new task is trained, affinities stay as they are, and with them the other tasks' outputs.
        self.trained = {name for name, head in model.heads.items() if next(head.parameters()).requires_grad}
        if self.interval > 0 and model.has_affinity and len(self.trained) == num_tasks:
            self.affinity_parameters = model.affinity_parameters(arguments.affinity_parameters == "first_block")
            conditioning = model.conditioning
            num_parameters = sum(parameter.numel() for parameter in self.affinity_parameters)
            self.troa = arguments.make_troa(conditioning.affinity, num_parameters).to(conditioning.affinity.device)
            conditioning.set_affinity(self.troa.affinity, self.troa.weights)
        if accelerator.distributed_type in SHARDING and (self.troa or self.balancing.needs_gradients):
            raise ValueError(
                f"under {accelerator.distributed_type.value} no process has whole gradients of the tasks: use DDP, or "
                "affinity_interval=0 and a balancing by losses"
            )
        # What a checkpoint has to hold besides the model.
        self.state = nn.ModuleDict({"balancing": self.balancing} | ({"troa": self.troa} if self.troa else {}))

    @property
    def num_parts(self) -> int:
        """Parts of a step's images whose gradients are compared with each other: 2 halves or 1."""
        return self.troa.num_parts if self.troa is not None else 1

    def history_interval(self, max_steps: int) -> int:
        """Every how many steps an affinity is worth recording: a multiple of the interval, at most 200 records."""
        return self.interval * max(1, round(max_steps / (200 * self.interval)))

    def affinity_record(self) -> dict[str, Any]:
        """The affinity, and in how many updates each task took part or was skipped."""
        assert self.troa is not None
        return {
            "affinity": self.troa.affinity.tolist(),
            "num_updates": self.troa.num_updates.tolist(),
            "num_skipped": self.troa.num_skipped.tolist(),
        }

    def begin(self, step: int, labels: Sequence[Mapping[str, Tensor]]) -> None:
        """Starts an optimiser step.

        Args:
            step: its number, counted from 0.
            labels: those of each call of `backward` to come. A task's loss in this step is the mean over all its
                labelled pixels, in whichever batch and process they are.
        """
        self.step = step
        self.passes_done = 0
        num_tasks = len(self.model.tasks)
        self.weights_T = self.task_weights_T * self.balancing.factors(step).cpu()
        self.learns_affinity = self.troa is not None and self.model.training and (step + 1) % self.interval == 0
        self.for_affinity = self.for_balancing = None
        self.positions_2TT: Tensor | None = None
        self.factors_AT = self._batch_factors(labels)
        if self.learns_affinity and self.troa is not None and self.troa.similarity != "spatial":
            self.for_affinity = GradientSums(self.affinity_parameters, self.num_parts, num_tasks)
        if self.balancing.needs_gradients:
            self.for_balancing = GradientSums(self.model.shared_parameters(), 1, num_tasks)
        sums = [collected for collected in (self.for_affinity, self.for_balancing) if collected is not None]
        self.collected_parameters = list(dict.fromkeys(p for collected in sums for p in collected.parameters))
        self.magnitudes_TBN: Tensor | None = None
        needs_gradients = self.learns_affinity or self.balancing.needs_gradients
        self.is_joint = not needs_gradients and (
            self.wrapped is not self.model or self.model.config.fan_out == "batched"
        )
        self.losses_T, self.labelled_T = torch.zeros(num_tasks), torch.zeros(num_tasks)

    def _batch_factors(self, labels: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """(A,T): the share of a batch in a task's labelled pixels, over the equal share that averaging gives it."""
        device = self.accelerator.device
        zero = torch.zeros((), device=device, dtype=torch.int64)
        counts_AT = torch.stack(
            [
                torch.stack(
                    [
                        task.labelled(batch[task.name]).sum() if task.name in batch else zero
                        for task in self.model.tasks
                    ]
                )
                for batch in labels
            ]
        )
        total_T = counts_AT.sum(dim=0)
        if self.accelerator.num_processes > 1:
            total_T = self.accelerator.reduce(total_T, "sum")
        num_batches = len(labels) * self.accelerator.num_processes
        # In whole numbers up to the division: a factor is exactly 1 where all batches have as many labels.
        return torch.where(total_T > 0, (counts_AT * num_batches).double() / total_T.clamp(min=1), 1.0).cpu()

    def backward(self, pixel_values: Tensor, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds the gradients of one batch to the parameters'; returns the unweighted losses, detached.

        Args:
            pixel_values: (B,3,H,W).
            labels: {task: label} for all tasks or some.

        Raises:
            ValueError: for wrong input.
        """
        run = self._joint_backward if self.is_joint else self._backward_per_task
        self.loss_weights = (self.weights_T * self.factors_AT[self.passes_done]).tolist()
        losses = run(pixel_values, {name: label for name, label in labels.items() if name in self.trained})
        for number, task in enumerate(self.model.tasks if self.balancing.needs_losses else ()):
            if task.name in losses and task.labelled(labels[task.name]).any():
                self.losses_T[number] += self.factors_AT[self.passes_done, number].float() * losses[task.name].cpu()
                self.labelled_T[number] += 1
        self.passes_done += 1
        return losses

    def finish(self) -> None:
        """Before clipping: averages over processes what no wrapper did, balances gradients, learns affinities."""
        if not self.is_joint and self.accelerator.num_processes > 1:
            self._average_gradients()
        if self.for_balancing is not None and isinstance(self.balancing, GradientBalancing):
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            gradients_TP = self._mean(self.for_balancing.values_HTP[0]) / scale
            # An overflow in float16 is left to the gradient scaler, which skips the step.
            if gradients_TP.isfinite().all():
                self.for_balancing.scatter(self.balancing.aggregate(gradients_TP, self.step) * scale)
        if self.learns_affinity:
            self._learn_affinity()
        self.for_affinity = self.for_balancing = None

    def observe(self) -> None:
        """After clipping, before the optimiser moves: shows the balancing the losses of the step."""
        if not self.balancing.needs_losses:
            return
        sums_2T = torch.stack([self.losses_T, self.labelled_T]).to(self.accelerator.device)
        losses_T, counts_T = self.accelerator.reduce(sums_2T, "sum").cpu()
        num_batches = len(self.factors_AT) * self.accelerator.num_processes
        self.balancing.observe(losses_T / num_batches, counts_T > 0)

    def _joint_backward(self, pixel_values: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = self.wrapped(pixel_values, labels=labels).losses
        names = self.model.task_names
        self.accelerator.backward(sum(self.loss_weights[names.index(name)] * losses[name] for name in losses))
        return {name: loss.detach() for name, loss in losses.items()}

    def _backward_per_task(self, pixel_values: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        model.check_labels(pixel_values, labels, model.tasks)
        # Several batches are dealt to the halves in turn; a single one is cut.
        num_parts = self.num_parts if self.learns_affinity and len(self.factors_AT) == 1 else 1
        learns_positions = self.learns_affinity and self.for_affinity is None
        with self.accelerator.autocast():
            shared = model.encode(pixel_values)
        leaves = shared.with_tensors([x.detach().requires_grad_(x.requires_grad) for x in shared.tensors])
        if learns_positions:
            leaves.tokens.hidden.requires_grad_()
            num_patches = shared.tokens.grid[0] * shared.tokens.grid[1]
            size_TBN = (len(model.tasks), len(pixel_values), num_patches)
            self.magnitudes_TBN = torch.zeros(size_TBN, device=pixel_values.device)
        parts = leaves.chunk(num_parts) if num_parts > 1 else [leaves]
        losses = {
            task.name: self._backward_task(
                number, task, labelled_parts(task, parts, labels[task.name]), shared, leaves
            )
            for number, task in enumerate(model.tasks)
            if task.name in labels
        }
        hand_on(shared, leaves)
        if self.magnitudes_TBN is not None:
            statistics_2TT = position_statistics(self.magnitudes_TBN)
            self.positions_2TT = statistics_2TT + (0 if self.positions_2TT is None else self.positions_2TT)
        return losses

    def _backward_task(
        self,
        number: int,
        task: Task,
        parts: Mapping[int, tuple[SharedFeatures, Tensor]],
        shared: SharedFeatures,
        leaves: SharedFeatures,
    ) -> Tensor:
        # The parts run apart but have one loss, so that its gradient is that of the whole batch.
        with self.accelerator.autocast():
            logits = [self.model.decode(part, task.name) for part, _ in parts.values()]
            logits_BKHW = torch.cat([part.detach() for part in logits]).requires_grad_()
            loss = task.loss(logits_BKHW, torch.cat([label for _, label in parts.values()]))
        self.accelerator.backward(self.loss_weights[number] * loss)
        assert logits_BKHW.grad is not None
        gradients = logits_BKHW.grad.split([len(part) for part in logits])
        for part, part_logits, gradient in zip(parts, logits, gradients, strict=True):
            with self._alone():
                part_logits.backward(gradient)
                if self.magnitudes_TBN is not None:
                    self.magnitudes_TBN[number] = gradient_magnitudes(leaves)
                if self.for_balancing is not None or self.magnitudes_TBN is not None:
                    hand_on(shared, leaves)
                for collected in (self.for_affinity, self.for_balancing):
                    if collected is not None:
                        collected.add(self.passes_done + part, number)
        return loss.detach()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, the parameters whose gradients are collected hold those of one backward pass alone."""
        before = [parameter.grad for parameter in self.collected_parameters]
        for parameter in self.collected_parameters:
            parameter.grad = None
        yield
        for parameter, gradient in zip(self.collected_parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _average_gradients(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        collected = GradientSums(parameters, num_parts=1, num_tasks=1)
        collected.add(0, 0)
        collected.scatter(self._mean(collected.values_HTP[0, 0]))

    def _mean(self, values: Tensor) -> Tensor:
        # Accelerate copies even where there is nothing to reduce.
        return self.accelerator.reduce(values, "mean") if self.accelerator.num_processes > 1 else values

    def _learn_affinity(self) -> None:
        assert self.troa is not None
        if self.for_affinity is None:
            assert self.positions_2TT is not None
            observation = self.accelerator.reduce(self.positions_2TT, "sum")
        else:
            # Of the unweighted losses; a weight of 0 leaves nothing to see.
            observation = self._mean(self.for_affinity.values_HTP)
            for number, weight in enumerate(self.weights_T.tolist()):
                observation[:, number].mul_(1 / weight if weight > 0 else 0.0)
        self.troa.update(observation)
        self.model.conditioning.set_affinity(self.troa.affinity, self.troa.weights)


def labelled_parts(
    task: Task, parts: Sequence[SharedFeatures], label: Tensor
) -> dict[int, tuple[SharedFeatures, Tensor]]:
    """{number of the part: its images that have a label, and their labels}: others would run for nothing.

    A part without any is left out. Where no image has a label, one stands for all, so that the task's gradients are
    zero and not absent.
    """
    found: dict[int, tuple[SharedFeatures, Tensor]] = {}
    for number, (part, part_label) in enumerate(zip(parts, label.chunk(len(parts)), strict=True)):
        has_label_B = task.labelled(part_label).flatten(1).any(dim=1)
        if has_label_B.all():
            found[number] = part, part_label
        elif has_label_B.any():
            indices = has_label_B.nonzero().flatten()
            found[number] = part.select(indices), part_label[indices]
    if not found:
        first = torch.zeros(1, dtype=torch.int64, device=label.device)
        found[0] = parts[0].select(first), label[:1]
    return found


def gradient_magnitudes(leaves: SharedFeatures) -> Tensor:
    """|dL/dz| (B,N) at the patch tokens of the fan-out; prefix tokens have no position."""
    gradient_BNC = leaves.tokens.hidden.grad
    assert gradient_BNC is not None
    num_patches = leaves.tokens.grid[0] * leaves.tokens.grid[1]
    return gradient_BNC[:, -num_patches:].float().norm(dim=-1)


def hand_on(shared: SharedFeatures, leaves: SharedFeatures) -> None:
    """Moves the gradients that have come together at the leaves on into what the tasks share, if it is trained."""
    trained, gradients = [], []
    for tensor, leaf in zip(shared.tensors, leaves.tensors, strict=True):
        if tensor.requires_grad and leaf.grad is not None:
            trained.append(tensor)
            gradients.append(leaf.grad)
        leaf.grad = None
    if trained:
        torch.autograd.backward(trained, gradients, retain_graph=True)
