"""TROA, task representation optimisation: from the gradients of the tasks to the affinities between them.

Shape suffixes: T tasks (S source, T target in matrices), P parameters, H parts of the batch (1 or 2 halves), B images,
N positions of the token grid.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Similarity = Literal["cosine", "split", "lookahead", "fisher", "spatial"]
Weighting = Literal["average", "mirror", "identity", "uniform", "common"]


# One float32 sum over millions of numbers loses digits; sums over slices of this length, added up, do not.
SLICE = 2**12


def inner_products(sources_TP: Tensor, targets_TP: Tensor) -> Tensor:
    """(T,T): <row s of the sources, row t of the targets>."""
    slices = zip(sources_TP.split(SLICE, dim=1), targets_TP.split(SLICE, dim=1), strict=True)
    return torch.stack([source @ target.t() for source, target in slices]).sum(dim=0)


def norms(values: Tensor) -> Tensor:
    """Euclidean norms over the last dimension."""
    slices = values.split(SLICE, dim=-1)
    return torch.stack([torch.linalg.vecdot(piece, piece) for piece in slices]).sum(dim=0).sqrt()


def cosine_similarity(sources_TP: Tensor, targets_TP: Tensor) -> Tensor:
    """(T,T): cosine between row s of the sources and row t of the targets; 0 where a row is zero."""
    norms_TT = norms(sources_TP).unsqueeze(1) * norms(targets_TP)
    # Divided last: normalised copies of the gradients would take more memory than the gradients.
    return torch.where(norms_TT > 0, inner_products(sources_TP, targets_TP) / norms_TT, 0.0)


def lookahead_similarity(gradients_TP: Tensor) -> Tensor:
    """(T,T) in [0,1]: the share of the step that target t wants which the step of source s makes.

    <G_s, G_t> / <G_t, G_t>, the first-order gain of one task by another's step (TAG, Fifty et al. 2021,
    arXiv:2109.04617), clipped.
    """
    products_TT = inner_products(gradients_TP, gradients_TP)
    return (products_TT / products_TT.diagonal()).nan_to_num(0.0).clamp(0, 1)


def position_statistics(magnitudes_TBN: Tensor) -> Tensor:
    """(2,T,T): sum over images of the correlation over positions of two tasks, and the number of images summed.

    An image counts for the pairs of tasks that both have a finite gradient in it which is not the same everywhere.
    Sums of several processes add up.
    """
    centred_TBN = magnitudes_TBN - magnitudes_TBN.mean(dim=-1, keepdim=True)
    norm_TB1 = centred_TBN.norm(dim=-1, keepdim=True)
    # What rounding leaves of a magnitude that is the same everywhere is no pattern.
    counts_TB1 = norm_TB1.isfinite() & (norm_TB1 > 1e-5 * magnitudes_TBN.norm(dim=-1, keepdim=True))
    unit_TBN = torch.where(counts_TB1, centred_TBN / norm_TB1, 0.0)
    counts_TB = counts_TB1.squeeze(-1).to(unit_TBN.dtype)
    return torch.stack([torch.einsum("sbn,tbn->st", unit_TBN, unit_TBN), counts_TB @ counts_TB.t()])


def average_weights(affinity_TT: Tensor) -> Tensor:
    """w (T,T), [source, target]: the affinity with columns that sum to 1; a column of zeros counts as identity."""
    total_1T = affinity_TT.sum(dim=0, keepdim=True)
    identity_TT = torch.eye(len(affinity_TT), dtype=affinity_TT.dtype, device=affinity_TT.device)
    return torch.where(total_1T > 0, affinity_TT / total_1T.where(total_1T > 0, 1.0), identity_TT)


class Troa(nn.Module):
    """Learns the task affinities while a model trains (METHOD section 2).

    Feed it the tasks' gradients every few steps with `update`, and give `affinity` and `weights` to the adapter. All
    state is in buffers, so that a checkpoint holds it. In eval mode nothing changes.

    Args:
        initial_TT: affinity that an entry keeps until its tasks were first seen together.
        num_parameters: P, used by "fisher" only.
        similarity: what is compared.
            "cosine": the gradients of a batch; symmetric, diagonal 1.
            "split": source on one half of the batch, target on the other; diagonal below 1.
            "lookahead": see `lookahead_similarity`; asymmetric.
            "fisher": running means of squared normalised gradients, on the two halves: which parameters a task moves,
                whatever the direction.
            "spatial": magnitudes of the gradient over the positions of an image: where tasks look.
        weighting: how affinities mix task embeddings.
            "average": columns of the affinity, normalised (the paper's).
            "mirror": exponentiated gradient with entropy; mirror_entropy = 0 is TAWT (Chen et al. 2022,
                arXiv:2105.14095), which ends with one source per target.
            "identity", "uniform", "common": controls that ignore the affinity, which is still learned and reported:
                an embedding for each task, the mean of all for each task, the first one for all (task-blind adapters).
        momentum: of the running means, which are corrected for their start.
        mirror_rate, mirror_entropy: eta and lambda of "mirror".

    Raises:
        ValueError: if a setting is not allowed.

    Example:
        >>> troa = Troa(torch.eye(2), similarity="cosine", momentum=0.0)
        >>> troa.update(torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]))
        >>> troa.affinity
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]])
    """

    initial: Tensor
    mean: Tensor
    num_observed: Tensor
    num_updates: Tensor
    num_skipped: Tensor
    log_weights: Tensor
    fisher: Tensor

    def __init__(
        self,
        initial_TT: Tensor,
        num_parameters: int = 0,
        similarity: Similarity = "fisher",
        weighting: Weighting = "average",
        momentum: float = 0.9,
        mirror_rate: float = 0.3,
        mirror_entropy: float = 0.3,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("similarity", similarity, get_args(Similarity)),
            ("weighting", weighting, get_args(Weighting)),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r} of task affinities; known are {list(allowed)}")
        if not 0 <= momentum < 1:
            raise ValueError(f"the momentum of task affinities is {momentum}; it must be at least 0 and less than 1")
        if mirror_rate <= 0 or mirror_entropy < 0 or mirror_rate * mirror_entropy > 1:
            raise ValueError(
                f"mirror_rate is {mirror_rate} and mirror_entropy {mirror_entropy}; the rate must be positive, the "
                "entropy at least 0, and their product at most 1"
            )
        self.similarity = similarity
        self.weighting = weighting
        self.momentum = momentum
        self.mirror_rate = mirror_rate
        self.mirror_entropy = mirror_entropy
        num_tasks = len(initial_TT)
        shape = (num_tasks, num_tasks)
        self.register_buffer("initial", initial_TT.detach().float().clone())
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("num_observed", torch.zeros(shape, dtype=torch.int64))
        # Per task: updates that it took part in, and those that it missed for want of a usable gradient.
        self.register_buffer("num_updates", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("num_skipped", torch.zeros(num_tasks, dtype=torch.int64))
        if weighting == "mirror":
            self.register_buffer("log_weights", torch.full(shape, 1 / num_tasks).log())
        if similarity == "fisher":
            self.register_buffer("fisher", torch.zeros(self.num_parts, num_tasks, num_parameters))

    @property
    def num_parts(self) -> int:
        """Parts of the batch whose gradients are wanted one by one: 2 halves or 1."""
        return 2 if self.similarity in ("split", "fisher") else 1

    @property
    def affinity(self) -> Tensor:
        """A (T,T) float32 in [0,1], [source, target]."""
        return self._signed_affinity().clamp(0, 1)

    @property
    def weights(self) -> Tensor:
        """w (T,T) float32, [source, target], columns sum to 1."""
        if self.weighting == "average":
            return average_weights(self.affinity)
        if self.weighting == "mirror":
            return self.log_weights.exp()
        identity_TT = torch.eye(len(self.initial), device=self.initial.device)
        if self.weighting == "identity":
            return identity_TT
        if self.weighting == "common":
            return identity_TT[:, :1].expand_as(identity_TT)
        return torch.full_like(identity_TT, 1 / len(identity_TT))

    @torch.no_grad()
    def update(self, observation: Tensor) -> None:
        """Takes in what one step says of the tasks.

        A task whose gradient is zero (as without labels) or not finite is skipped: its entries stay as they are. One
        that just one half shows moves as a source (first half) or a target (second half) alone, and counts as skipped.

        Args:
            observation: gradients (H,T,P) of the tasks' unweighted losses, averaged over processes, with H =
                `num_parts`; for "spatial" the (2,T,T) of `position_statistics`, summed over processes.
        """
        if not self.training:
            return
        similarity_TT, usable_TT = self._similarity(observation.float())
        self.num_observed += usable_TT
        self.num_updates += usable_TT.diagonal()
        self.num_skipped += ~usable_TT.diagonal()
        moved_TT = self.momentum * self.mean + (1 - self.momentum) * similarity_TT
        self.mean.copy_(torch.where(usable_TT, moved_TT, self.mean))
        if self.weighting == "mirror":
            moved_TT = (1 - self.mirror_rate * self.mirror_entropy) * self.log_weights
            moved_TT = (moved_TT + self.mirror_rate * self._signed_affinity()).log_softmax(dim=0)
            self.log_weights.copy_(torch.where(usable_TT.any(dim=0), moved_TT, self.log_weights))

    def _similarity(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(T,T) similarities, and where they can be used."""
        if self.similarity == "spatial":
            sum_TT, count_TT = observation
            return sum_TT / count_TT.clamp(min=1), count_TT > 0
        norm_HT = norms(observation)
        usable_HT = norm_HT.isfinite() & (norm_HT > 0)
        compared_HTP = observation
        if self.similarity == "fisher":
            for part, task in usable_HT.nonzero().tolist():
                unit_P = observation[part, task] / norm_HT[part, task]
                self.fisher[part, task].mul_(self.momentum).addcmul_(unit_P, unit_P, value=1 - self.momentum)
            compared_HTP = self.fisher
        if self.similarity == "lookahead":
            similarity_TT = lookahead_similarity(compared_HTP[0])
        else:
            similarity_TT = cosine_similarity(compared_HTP[0], compared_HTP[-1])
        return similarity_TT, usable_HT[0].unsqueeze(1) & usable_HT[-1]

    def _signed_affinity(self) -> Tensor:
        """C (T,T): running means, corrected for their start; what was never observed is as it was given."""
        correction_TT = 1 - self.momentum ** self.num_observed.to(self.mean.dtype)
        return torch.where(self.num_observed > 0, self.mean / correction_TT, self.initial)
