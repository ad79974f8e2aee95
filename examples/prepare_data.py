"""Turns a data set as its authors publish it into parquet files that train_multitask.py reads one frame at a time.

    python examples/prepare_data.py nyuv2 downloads/nyu_depth_v2 data/nyuv2
    python examples/prepare_data.py taskonomy downloads/taskonomy data/taskonomy --options subset=tiny --jobs 16
    python examples/prepare_data.py cityscapes downloads/cityscapes data/cityscapes --options derive=normals,edges
    python examples/train_multitask.py --dataset prepared --data_dir data/nyuv2 --output_dir outputs/nyuv2

OUT then holds train-00000-of-00007.parquet ..., validation-..., and info.json with a report, which is printed too:
frames, how many have each label, class shares, depth range, and every frame that was skipped, with the reason. Stopped
and started again, the program goes on where it was. The same files can be loaded or streamed with
`datasets.load_dataset("parquet", data_files="OUT/train-*.parquet")`.

What each data set's folder must hold, its classes, units and licence: the docstrings in src/mt_adapters/data.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm

from mt_adapters.data import DATASETS, get_dataset
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.preparation import prepare_split


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value may be a whole number, or several texts with commas."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    if value.isdecimal():
        return name, int(value)
    return name, value.split(",") if "," in value or name == "derive" else value


def progress(frames: Iterator[int], total: int) -> Iterator[int]:
    with tqdm(total=total, unit="frame") as bar:
        for number in frames:
            bar.update(number)
            yield number


def report_lines(split: str, report: dict[str, Any]) -> Iterator[str]:
    skipped = report["skipped"]
    yield f"{split}: {report['num_frames']} frames, {len(skipped)} skipped"
    for label, entry in report["labels"].items():
        line = f"  {label}: {entry['frames']:.1%} of the frames, {entry['pixels']:.1%} of their pixels"
        if "min" in entry:
            line += f"; {entry['min']:.2f} to {entry['max']:.2f} m, mean {entry['mean']:.2f} m"
        yield line
        for name, share in entry.get("classes", {}).items():
            yield f"    {name}: {share:.2%}"
    for entry in skipped[:20]:
        yield f"  skipped {entry['frame']}: {entry['reason']}"
    if len(skipped) > 20:
        yield f"  and {len(skipped) - 20} more, all in info.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "set", choices=[name for name in DATASETS if name != "prepared"], metavar="SET", help="%(choices)s"
    )
    parser.add_argument("raw", type=Path, help="the data set's folder")
    parser.add_argument("output", type=Path, help="folder for the parquet files")
    parser.add_argument("--options", nargs="*", type=option, default=[], metavar="NAME=VALUE", help="of the data set")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=[*SPLITS])
    parser.add_argument("--frames_per_shard", type=int, default=1000, help="frames in one parquet file")
    parser.add_argument("--max_bad_share", type=float, default=0.05, help="stop if more of the frames are bad")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the frames")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in arguments.splits:
        dataset = get_dataset(arguments.set)(split, arguments.raw, **dict(arguments.options))
        written = prepare_split(
            dataset,
            split,
            arguments.output,
            frames_per_shard=arguments.frames_per_shard,
            max_bad_share=arguments.max_bad_share,
            jobs=arguments.jobs,
            seed=arguments.seed,
            show=progress,
        )
        print("\n".join(report_lines(split, written["report"])))
    print(f"Everything is in {arguments.output}")


if __name__ == "__main__":
    main()
