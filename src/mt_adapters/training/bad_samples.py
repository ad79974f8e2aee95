"""Frames that could not be used: counted, named once, and a reason to stop if they are too many."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A share of fewer frames than these, or than the whole set, says little.
MIN_DRAWN = 1000
MAX_KEPT = 100


def no_bad_samples() -> dict[str, Any]:
    """Counts of all processes, and the first problems of this one."""
    return {"num_drawn": 0, "num_bad": 0, "problems": []}


class BadSamples:
    """Watches over what `on_bad_sample=skip` skips.

    Args:
        counts: from `no_bad_samples`, or of the run that is resumed; brought up to date in place.
        max_share: the largest share of bad ones among the frames drawn.
        num_frames: of the data set.
    """

    def __init__(self, counts: dict[str, Any], max_share: float, num_frames: int) -> None:
        self.counts, self.max_share, self.num_frames = counts, max_share, num_frames

    def add(self, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> None:
        """Counts the frames of a step.

        Raises:
            ValueError: if more than `max_share` of the frames drawn so far were bad.
        """
        kept = self.counts["problems"]
        for problem in (problem for batch in batches for problem in batch["problems"]):
            if problem not in kept:
                logger.warning("skipped a bad frame: %s", problem)
                if len(kept) < MAX_KEPT:
                    kept.append(problem)
        numbers = [sum(len(batch[key]) for batch in batches) for key in ("pixel_values", "problems")]
        if accelerator.num_processes > 1:
            numbers = accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "sum").tolist()
        self.counts["num_drawn"] += numbers[0]
        self.counts["num_bad"] += numbers[1]
        if self.counts["num_drawn"] >= min(MIN_DRAWN, self.num_frames):
            self.check()

    def check(self) -> None:
        """
        Raises:
            ValueError: as `add`, however few frames were drawn.
        """
        num_bad, num_drawn = self.counts["num_bad"], self.counts["num_drawn"]
        if num_bad > self.max_share * num_drawn:
            example = f"One is {self.counts['problems'][0]} " if self.counts["problems"] else ""
            raise ValueError(
                f"{num_bad} of the {num_drawn} frames drawn were bad, more than max_bad_share={self.max_share}. "
                f"{example}Mend the files, or raise max_bad_share"
            )
