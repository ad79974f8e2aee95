"""Predicts all tasks for your own pictures: one PNG per picture and task, at the picture's own size.

    python examples/predict.py photo.jpg
    python examples/predict.py a.jpg b.png --model outputs/rooms_dinov2_small --output_dir maps

The default model, an adapter on a small Swin, comes with the package and was trained on rendered rooms.
Depth is light near the camera; normals are coloured x right (red), y up (green), towards the camera (blue).
"""

import argparse
from pathlib import Path

from mt_adapters import MultitaskDensePredictionPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--model", default="mt-adapters/vta-swin-nano-rooms", help="folder or Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/predictions"))
    arguments = parser.parse_args()

    predict = MultitaskDensePredictionPipeline.from_pretrained(arguments.model)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for path in arguments.pictures:
        for task, result in predict(path).items():
            file = arguments.output_dir / f"{path.stem}_{task}.png"
            result["picture"].save(file)
            print(file)


if __name__ == "__main__":
    main()
