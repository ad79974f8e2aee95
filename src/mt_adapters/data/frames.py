"""What every data set is: a list of frames, each an image and the labels that it has.

A sample is `{"image": uint8 (3,H,W) RGB, "labels": {name: label}}` in the units of the tasks (`mt_adapters.tasks`).
A frame without a label of some kind leaves its name out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mt_adapters.data.derived import Intrinsics, edges_from_labels, normals_from_depth
from mt_adapters.data.pictures import RGB, BadSampleError, StoredLabel, encode_png, open_picture, read_file

SPLITS = ("train", "validation")


@overload
def in_units(label: StoredLabel | Tensor) -> Tensor: ...
@overload
def in_units(label: None) -> None: ...
def in_units(label: StoredLabel | Tensor | None) -> Tensor | None:
    """A label in its task's units."""
    return label.decode(label.codes) if isinstance(label, StoredLabel) else label


class FrameDataset(Dataset[dict[str, Any]], ABC):
    """A data set in which `dataset[i]` is a sample with all its labels, and `read(i, names)` one with some of them.

    Subclasses say what they have (`labels`, `summary`) and how to get at it (`_frame`, `_image`, `_label`).
    """

    # Label name -> the names of its classes, or None where it has no classes. What a frame may have.
    labels: Mapping[str, tuple[str, ...] | None]
    # What the set is called.
    set_name: str
    # What it is, where to get it and its licence, in one or two sentences; for the cards of models trained on it.
    summary: str
    # Metres per step of the 16-bit codes in which `examples/prepare_data.py` stores depth.
    depth_unit: float = 1 / 1000

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What a frame is called in errors and reports, unique in the split."""

    @abstractmethod
    def _frame(self, index: int) -> Any:
        """Whatever the following methods need to find the frame's parts."""

    @abstractmethod
    def _image(self, frame: Any) -> Image.Image:
        """The image in RGB."""

    @abstractmethod
    def _label(self, frame: Any, label: str) -> StoredLabel | Tensor | None:
        """One label as it is stored, or in its task's units, (H,W) or (3,H,W); None if this frame has none."""

    def _image_bytes(self, frame: Any) -> bytes:
        """The image as a JPEG or PNG file."""
        return encode_png(np.asarray(self._image(frame)))

    @property
    def shard_lengths(self) -> list[int]:
        """Numbers of frames that lie next to each other on the disk, in the order of the indices."""
        return [len(self)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample with all labels that the frame has, in their tasks' units.

        Raises:
            BadSampleError: as `read`, or if a label holds a value out of range.
        """
        sample = self.read(index, self.labels)
        labels = {name: in_units(label) for name, label in sample["labels"].items()}
        return {"image": torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1), "labels": labels}

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        """The sample as it is stored: a picture, and the labels of these names that the frame has.

        A label is a `StoredLabel`, or a tensor in its task's units where it was worked out.

        Raises:
            BadSampleError: if a file is missing, damaged, or stored in another way or size; with the file or column
                and the rule.
        """
        frame = self._frame(index)
        image = self._image(frame)
        labels = {}
        for name in names:
            label = self._label(frame, name)
            if label is None:
                continue
            size = label.size if isinstance(label, StoredLabel) else tuple(label.shape[-2:])
            if size != (image.height, image.width):
                raise BadSampleError(
                    f"{self.name(index)}: the label {name!r} is {size[0]} x {size[1]} pixels, but the image is "
                    f"{image.height} x {image.width}; all labels must have the image's size."
                )
            labels[name] = label
        return {"image": image, "labels": labels}

    def image_bytes(self, index: int) -> bytes:
        """The image as it is stored, JPEG or PNG.

        Raises:
            BadSampleError: if the file is missing.
        """
        return self._image_bytes(self._frame(index))


class FolderDataset(FrameDataset):
    """Frames in a folder, in the layout in which their authors publish them.

    Args:
        split: "train" or "validation".
        data_dir: the folder; what it must hold is in `layout`.
        derive: labels that the set lacks and that are to be worked out (`mt_adapters.data.derived`): "normals" from
            depth, where the camera is known, "edges" from depth and classes.

    Raises:
        ValueError: for an unknown split, a folder that does not hold what it should, or a label that cannot be
            derived.
    """

    layout: ClassVar[str]
    # What `derive` may name.
    derivable: ClassVar[tuple[str, ...]] = ()
    # The stored labels that each is derived from; one of them is enough.
    derived_from: ClassVar[Mapping[str, tuple[str, ...]]] = {"normals": ("depth",), "edges": ("semseg", "depth")}

    def __init__(self, split: str, data_dir: str | Path | None, derive: Sequence[str] = ()) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known are: {', '.join(SPLITS)}")
        kind = type(self).__name__
        if data_dir is None:
            raise ValueError(f"{kind} needs data_dir, the folder with {self.layout}")
        self.split, self.root = split, Path(data_dir)
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {str(data_dir)!r}; give {kind} the folder with {self.layout}")
        wrong = [name for name in derive if name not in self.derivable or name in self.labels]
        if wrong:
            raise ValueError(f"{kind} cannot derive {wrong}; derive may name {list(self.derivable)}")
        self.derive = tuple(derive)
        self.labels = {**self.labels, **dict.fromkeys(self.derive)}
        self.frames: Sequence[str] = self._find_frames()
        if not self.frames:
            raise ValueError(
                f"{str(data_dir)!r} holds no frame of the split {split!r}; {kind} needs a folder with {self.layout}"
            )
        missing = {label: folder for label, folder in self._label_folders().items() if not folder.is_dir()}
        self.labels = {label: classes for label, classes in self.labels.items() if label not in missing}
        for label in self.derive:
            sources = self.derived_from[label]
            if not any(source in self.labels for source in sources):
                folders = [str(missing[source]) for source in sources if source in missing]
                raise ValueError(f"{kind} derives {label!r} from {' or '.join(sources)}, but there is no {folders}")

    @abstractmethod
    def _find_frames(self) -> Sequence[str]:
        """The names of the split's frames, sorted, from which all their files' paths follow."""

    @abstractmethod
    def _image_path(self, frame: str) -> Path: ...

    @abstractmethod
    def _stored_label(self, frame: str, label: str) -> StoredLabel | Tensor | None:
        """`_label` for labels that are not derived."""

    def _label_folders(self) -> Mapping[str, Path]:
        """The folders of labels that may be missing, as sets are published in parts; without it, no such label."""
        return {}

    def _regions(self, frame: str) -> StoredLabel | Tensor | None:
        """Ids (H,W) whose borders are edges, 255 = no label; by default the classes."""
        return self._stored_label(frame, "semseg")

    def _intrinsics(self, frame: str, height: int, width: int) -> Intrinsics:
        """The camera of a frame; only where "normals" is derivable."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, index: int) -> str:
        return self.frames[index]

    def _frame(self, index: int) -> str:
        return self.frames[index]

    def _label(self, frame: str, label: str) -> StoredLabel | Tensor | None:
        if label not in self.labels:
            return None
        if label not in self.derive:
            return self._stored_label(frame, label)
        sources = [source for source in self.derived_from[label] if source in self.labels]
        depth = in_units(self._stored_label(frame, "depth")) if "depth" in sources else None
        if label == "normals":
            return None if depth is None else normals_from_depth(depth, self._intrinsics(frame, *depth.shape))
        ids = in_units(self._regions(frame)) if "semseg" in sources else None
        return None if ids is None and depth is None else edges_from_labels(ids, depth)

    def _image_bytes(self, frame: str) -> bytes:
        return read_file(self._image_path(frame))

    def _image(self, frame: str) -> Image.Image:
        return open_picture(self._image_bytes(frame), RGB, repr(str(self._image_path(frame))))
