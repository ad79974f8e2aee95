"""Program of `test_sharding.py`: a training step whose parameters are sharded over processes (FSDP2), or under DDP.

    torchrun --nproc_per_node 2 tests/training/sharded_in_processes.py FOLDER

Rank 0 writes FOLDER/WAY-FAMILY.safetensors with the loss of each process, all gradients and the stepped parameters.
"""

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from mt_adapters import VtaModel
from mt_adapters.tuners.vta import VtaLayer
from tiny_models import FAMILIES, make_images, make_labels, make_model

LEARNING_RATE = 0.1
CASES = [(way, family) for way in ("fsdp", "fsdp_checkpointed", "ddp") for family in ("swin", "dinov2")]


def make_training_model(family: str) -> VtaModel:
    torch.manual_seed(0)
    return make_model(family).double().train()


def half_of_the_batch(family: str, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    size, part = FAMILIES[family].size, slice(2 * rank, 2 * rank + 2)
    labels = {
        name: label.double() if label.is_floating_point() else label for name, label in make_labels(size, 4).items()
    }
    return make_images(size, 4)[part].double(), {name: label[part] for name, label in labels.items()}


def wrap(model: VtaModel, way: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(copy.deepcopy(model))
    if way == "fsdp_checkpointed":
        model.gradient_checkpointing_enable()
    for layer in model.modules():
        if isinstance(layer, VtaLayer):
            fully_shard(layer)
    return fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).contiguous()


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for way, family in CASES:
        model = wrap(make_training_model(family), way)
        pixel_values, labels = half_of_the_batch(family, rank)
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        losses = [torch.zeros_like(loss.detach()) for _ in range(2)]
        distributed.all_gather(losses, loss.detach())
        found = {"losses": torch.stack(losses)}
        trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        found |= {f"gradient of {name}": whole(parameter.grad) for name, parameter in trained.items()}
        torch.optim.SGD(trained.values(), lr=LEARNING_RATE).step()
        found |= {f"stepped {name}": whole(parameter) for name, parameter in trained.items()}
        if rank == 0:
            save_file(found, folder / f"{way}-{family}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
