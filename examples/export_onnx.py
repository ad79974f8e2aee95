"""Exports a model folder, a Hub id or an adapter to ONNX, one output per task, and checks it with ONNX Runtime.

    python examples/export_onnx.py outputs/demo model.onnx
    python examples/export_onnx.py outputs/demo model.onnx --image_size 256
    python examples/export_onnx.py outputs/rooms_dinov2_small/adapter model.onnx --adapter

The file takes "pixel_values" (batch, 3, height, width), as the image processor makes them, and gives each task's
logits under the task's name. The batch has any size. Height and width are free from the size on that is printed;
below it a file takes one size only. For Swin it is 225 pixels (window of 7): in smaller images the last stage is one
window, which transformers does not shift, and an ONNX graph either shifts or does not. A file for any size gives
slightly wrong results, and no error, for smaller images.

Needs `pip install "mt-adapters[export]"`; on Python 3.10 ONNX Runtime lacks what a plain ViT needs for images smaller
than in pretraining. The largest difference from torch, relative to the largest logit, is printed for each task.
"""

import argparse
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from mt_adapters import VtaModel

TOLERANCE = 1e-3


class TaskLogits(nn.Module):
    """The model with a plain tuple of logits (B,K,H,W) as its output."""

    def __init__(self, model: VtaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(pixel_values).logits.values())


def smallest_free_size(model: VtaModel) -> int:
    """Side of the smallest image of a file for any size: there, each stage's map is larger than a window."""
    family, config = model.family, model.config.backbone_config
    if not family.windowed:
        return family.min_image_size(config)
    return max(
        max(family.attention_grid(config, stage)) * stride + 1
        for stage, stride in enumerate(family.map_strides(config))
    )


def export(model: VtaModel, file: Path, side: int, any_size: bool) -> None:
    """Writes the ONNX file for images of `side` x `side` pixels, or of any size."""
    if any_size:
        # Tracing keeps the branches that this image takes: its patches and windows must all need padding.
        side = smallest_free_size(model) + 1
    free = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    with torch.no_grad(), warnings.catch_warnings():
        # Mostly that branches are kept; whether these are the right ones is measured below.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            TaskLogits(model),
            (torch.randn(2, 3, side, side),),
            file,
            # The newer exporter does not come to an end over the symbolic sizes of Swin's windows.
            dynamo=False,
            input_names=["pixel_values"],
            output_names=model.task_names,
            dynamic_axes=dict.fromkeys(["pixel_values", *model.task_names], free),
        )
    # The exporter loses the number of channels.
    exported = onnx.load(file)
    for output, task in zip(exported.graph.output, model.tasks, strict=True):
        output.type.tensor_type.shape.dim[1].dim_value = task.num_channels
    onnx.save(exported, file)


@torch.no_grad()
def differences(
    model: VtaModel, session: onnxruntime.InferenceSession, batch_size: int, size: tuple[int, int]
) -> dict[str, float]:
    """{task: largest difference of the logits, relative to the largest logit} for random images."""
    pixel_values = torch.randn(batch_size, 3, *size)
    logits = model(pixel_values).logits
    found = dict(zip(logits, session.run(list(logits), {"pixel_values": pixel_values.numpy()}), strict=True))
    return {
        task: float((torch.from_numpy(found[task]) - expected).abs().max() / expected.abs().max())
        for task, expected in logits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("file", type=Path, help="ONNX file to write")
    parser.add_argument("--adapter", action="store_true", help="it is an adapter, to be put on its backbone")
    parser.add_argument("--backbone", help="folder or Hub id of the adapter's backbone, if it has moved")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the image processor's")
    parser.add_argument("--fixed_size", action="store_true", help="only images of this size")
    arguments = parser.parse_args()

    if arguments.adapter:
        model = VtaModel.from_adapter(arguments.model, backbone=arguments.backbone)
    else:
        model = VtaModel.from_pretrained(arguments.model)
    model = model.float().eval()
    # Both ways agree to rounding, and this one never cuts a batch into tasks.
    model.config.fan_out = "sequential"
    side = arguments.image_size or AutoImageProcessor.from_pretrained(arguments.model).size["height"]
    smallest = smallest_free_size(model)
    any_size = side >= smallest and not arguments.fixed_size
    export(model, arguments.file, side, any_size)

    print(f"{arguments.file}: pixel_values to {', '.join(model.task_names)}; any batch size")
    if any_size:
        print(f"height and width: any from {smallest} pixels on\n")
    else:
        print(f"height and width: fixed at {side} x {side}; any size needs --image_size {smallest} or more\n")
    session = onnxruntime.InferenceSession(arguments.file, providers=["CPUExecutionProvider"])
    sizes = [(side, side), (side + 19, side + 6)] if any_size else [(side, side)]
    found = []
    print(f"{'task':12} {'batch':>5} {'height':>6} {'width':>6}  largest relative difference from torch")
    for size in sizes:
        for batch_size in (1, 3):
            for task, difference in differences(model, session, batch_size, size).items():
                print(f"{task:12} {batch_size:5} {size[0]:6} {size[1]:6}  {difference:.1e}")
                found.append(difference)
    # Written so that NaN fails.
    if not all(difference < TOLERANCE for difference in found):
        raise SystemExit(f"a difference is not below {TOLERANCE}; try --fixed_size")


if __name__ == "__main__":
    main()
