"""Program of `test_processes.py`: training steps on this process's share of a batch; writes what comes out.

    torchrun --nproc_per_node 2 tests/training/steps_in_processes.py FOLDER

It writes FOLDER/RANK.safetensors with, for each way to run a step, the affinity and all gradients.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep
from tiny_models import FAMILIES, make_images, make_model

BATCH_SIZE = 4
# Losses that are means over pixels, and all pixels labelled: the mean over processes is the mean over the batch.
TASKS = ["semseg", {"name": "depth", "loss_type": "l1"}, "normals", {"name": "edges", "loss_type": "l1"}]
WAYS = {
    "cosine": {"affinity_similarity": "cosine"},
    "spatial": {"affinity_similarity": "spatial"},
    "without affinities": {"affinity_interval": 0},
    "balanced": {"affinity_interval": 0, "balancing": "mgda"},
    "some labels": {"affinity_similarity": "cosine"},
    "uncertainty": {"affinity_interval": 0, "balancing": "uncertainty"},
}


def make_batch() -> tuple[Tensor, dict[str, Tensor]]:
    size = FAMILIES["swin"].size
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH_SIZE, *size)
    return make_images(size, BATCH_SIZE), {
        "semseg": torch.randint(0, 5, shape, generator=generator),
        "depth": torch.rand(shape, generator=generator) + 1,
        "normals": F.normalize(torch.randn(BATCH_SIZE, 3, *size, generator=generator), dim=1),
        "edges": torch.rand(shape, generator=generator),
    }


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, share = accelerator.process_index, BATCH_SIZE // accelerator.num_processes
    found = {}
    for way, arguments in WAYS.items():
        torch.manual_seed(0)
        model = make_model("swin", tasks=TASKS).train()
        wrapped = accelerator.prepare_model(model)
        step = MultitaskStep(model, wrapped, accelerator, MultitaskArguments(**{"affinity_interval": 1} | arguments))
        images, labels = make_batch()
        images = images[rank * share :][:share]
        labels = {name: label[rank * share :][:share] for name, label in labels.items()}
        if way == "some labels" and (rank > 0 or accelerator.num_processes == 1):
            # Depth is labelled in the first process only, edges nowhere.
            labels["depth"][-2:] = 0.0
        if way == "some labels":
            del labels["edges"]
        step.begin(0, [labels])
        step.backward(images, labels)
        step.finish()
        step.observe()
        found[f"{way}/affinity"] = model.affinity
        found |= {f"{way}/gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        if arguments.get("balancing") == "uncertainty":
            found[f"{way}/log_variances"] = step.balancing.log_variances.grad
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
