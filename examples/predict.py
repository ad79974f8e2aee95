"""Predicts all tasks for your own pictures: one PNG per picture and task, at the picture's own size.

    python examples/predict.py photo.jpg
    python examples/predict.py a.jpg b.png --model outputs/rooms_dinov2_small --output_dir maps

Depth is light near the camera; normals are coloured x right (red), y up (green), towards the camera (blue).
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from mt_adapters import VtaModel


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--model", default="outputs/demo", help="folder or Hub id; default: what `make demo` trained")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/predictions"))
    arguments = parser.parse_args()

    model = VtaModel.from_pretrained(arguments.model).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for path in arguments.pictures:
        # Cameras note the orientation instead of turning the pixels.
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        output = model(**processor(picture, return_tensors="pt"))
        maps = processor.post_process(output, target_sizes=[(picture.height, picture.width)])[0]
        for task in model.tasks:
            file = arguments.output_dir / f"{path.stem}_{task.name}.png"
            Image.fromarray(task.colorize(maps[task.name]).numpy()).save(file)
            print(file)


if __name__ == "__main__":
    main()
