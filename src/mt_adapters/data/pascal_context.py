"""PASCAL-Context for several tasks (PASCAL_MT): photographs of PASCAL VOC 2010 with five kinds of labels.

    JPEGImages/ID.jpg                    8-bit RGB
    semseg/VOC12/ID.png                  8-bit ids with a palette, 0 to 20, 255 no label; where there is none,
    semseg/pascal-context/ID.png         the same codes, drawn from the annotations of PASCAL-Context
    human_parts/ID.mat                   anno.objects: class_ind, mask, parts (part_name, mask); 15 is a person
    pascal-context/trainval/ID.mat       LabelMap (H,W): classes 1 to 459, of which 431 is "unknown"; 0 none
    normals_distill/ID.png               8-bit RGB of n * 0.5 + 0.5
    sal_distill/ID.png                   8-bit grey, salient above half
    ImageSets/Context/{train,val}.txt    an ID a line

Splits: "train" is the official train (4,998 frames), "validation" the official val (5,105). Readers write further
files to ImageSets/Parts (which frames have persons, as JSON); they are not needed here.

Units and rules. Edges are 0 or 1 everywhere and those of the authors, pixel by pixel: where the Laplacian of LabelMap
is not zero, thinned to one pixel; borders of class 431 are edges too. Normals and saliency are predictions of other
networks ("distilled"); normals are kept where LabelMap has one of the classes that occur indoors (a table, below).
They are stored with x LEFT, y up, z towards the camera: in the figure of the authors' README (doc/qual.png), in both
of its rows, red falls across each of four heads from left to right (by 0.4 to 0.9 of n); a seat's top has y = 0.84, a
ceiling y = -0.17, and what faces the camera z = 0.9. Human parts are six groups of the 24 annotated parts; a frame
without an annotated person has no such label, as in the literature, which ignores it in training and in scores.

Quirks. Maps of another size than the image's, which the authors' reader resizes, are resized to the nearest pixel if
they have the image's shape to one pixel, and are errors otherwise. Distilled normals are made unit vectors; what is
shorter than half, and black, is no label.

Not verified on true files: the codes of semseg/pascal-context (read here, as by all users, like those of VOC12), the
number type of LabelMap (any whole numbers are read), and the axes of normals_distill (the figure shows predictions of
a network trained on it).

Sources: fblib/dataloaders/pascal_context.py, fblib/evaluation and fblib/util/db_info/{nyu,context}_classes.json of
https://github.com/facebookresearch/astmt (Maninis et al., CVPR 2019): layout, part groups, classes, thresholds; the
same in https://github.com/SimonVandenhende/Multi-Task-Learning-PyTorch, https://github.com/brdav/atrc and
https://github.com/prismformore/Multi-Task-Transformer. Get it from
https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz or, as ATRC and InvPT do,
https://data.vision.ee.ethz.ch/brdavid/atrc/PASCALContext.tar.gz. Licence: photographs from Flickr, under its terms of
use (http://host.robots.ox.ac.uk/pascal/VOC/voc2010); no licence of the labels was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_adapters.data.arrays import class_codes, normal_map, read_array
from mt_adapters.data.frames import FolderDataset
from mt_adapters.data.pictures import (
    IDS_8_BIT,
    IDS_WITH_PALETTE,
    NORMALS_8_BIT,
    SEMSEG_NO_LABEL,
    BadSampleError,
    StoredLabel,
    class_ids,
    id_table,
    read_picture,
)
from mt_adapters.data.thinning import thin

SEMSEG_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
IDS = id_table({code: code for code in range(len(SEMSEG_CLASSES))}, no_label=[SEMSEG_NO_LABEL])
PERSON = 15
# The six groups of ASTMT, HUMAN_PART[6].
PARTS: dict[str, tuple[str, ...]] = {
    "head": ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    "torso": ("neck", "torso"),
    "upper arm": ("luarm", "ruarm"),
    "lower arm": ("lhand", "llarm", "rhand", "rlarm"),
    "upper leg": ("luleg", "ruleg"),
    "lower leg": ("lfoot", "llleg", "rfoot", "rlleg"),
}
PART_CLASSES = ("background", *PARTS)
PART_IDS = {part: number for number, group in enumerate(PARTS.values(), start=1) for part in group}
SALIENT_ABOVE = 127
# x left, y up, z towards the camera: see above.
NORMAL_AXES = (-1, 1, 1)
NUM_CONTEXT_CLASSES = 459
# The classes of LabelMap that also occur in NYU Depth V2, on which the network for normals was trained, and tvmonitor.
INDOOR_CLASSES = np.array(
    "3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72 "
    "73 78 83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158 159 165 "
    "172 174 181 183 184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246 "
    "250 251 252 255 260 261 263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 "
    "314 315 319 323 329 330 331 336 342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 "
    "405 407 408 411 412 413 414 417 419 421 423 427 429 430 432 440 441 442 443 444 446 454 457".split(),
    dtype=np.int64,
)
FOLDERS = {
    "semseg": "semseg",
    "parts": "human_parts",
    "saliency": "sal_distill",
    "normals": "normals_distill",
    "edges": "pascal-context",
}


class PascalContextDataset(FolderDataset):
    """Frames of PASCAL-Context with `semseg` (21 classes), `parts` (7), `saliency` (2), `normals` and `edges`.

    `parts` and `saliency` are read by tasks of those names and the type "semseg".

    Args:
        split: "train" or "validation".
        data_dir: the folder PASCAL_MT; a label whose folder is missing is left out.

    Raises:
        ValueError: see `FolderDataset`.
        ImportError: from `dataset[i]`, if scipy is missing, which reads MATLAB's files.
    """

    set_name = "pascal_context"
    labels: Mapping[str, tuple[str, ...] | None] = {
        "semseg": SEMSEG_CLASSES,
        "parts": PART_CLASSES,
        "saliency": ("background", "salient"),
        "normals": None,
        "edges": None,
    }
    summary = (
        "PASCAL-Context for multitask learning (PASCAL_MT of ASTMT), from https://github.com/facebookresearch/astmt. "
        "Licence: photographs from Flickr under its terms of use, labels without a licence"
    )
    layout = "JPEGImages, semseg, human_parts, pascal-context, normals_distill, sal_distill and ImageSets (PASCAL_MT)"

    def _find_frames(self) -> list[str]:
        name = {"train": "train", "validation": "val"}[self.split]
        file = self.root / "ImageSets" / "Context" / f"{name}.txt"
        return file.read_text(encoding="utf-8").split() if file.is_file() else []

    def _label_folders(self) -> dict[str, Path]:
        return {label: self.root / folder for label, folder in FOLDERS.items()}

    def _image_path(self, frame: str) -> Path:
        return self.root / "JPEGImages" / f"{frame}.jpg"

    def _stored_label(self, frame: str, label: str) -> StoredLabel | Tensor | None:
        with Image.open(self._image_path(frame)) as picture:
            size = picture.height, picture.width
        if label == "semseg":
            folders = [self.root / "semseg" / kind for kind in ("VOC12", "pascal-context")]
            path = next((folder / f"{frame}.png" for folder in folders if (folder / f"{frame}.png").is_file()), None)
            path = path or folders[0] / f"{frame}.png"
            ids = fitted(read_picture(path, IDS_WITH_PALETTE), size, path)
            return StoredLabel(ids, partial(class_ids, table=IDS, name=repr(str(path))))
        if label == "parts":
            return self._parts(frame, size)
        if label == "saliency":
            path = self.root / "sal_distill" / f"{frame}.png"
            is_salient = fitted(read_picture(path, IDS_8_BIT), size, path) > SALIENT_ABOVE
            return torch.from_numpy(is_salient.astype(np.int64))
        context = self._context_classes(frame, size)
        if label == "edges":
            return torch.from_numpy(borders(context).astype(np.float32))
        path = self.root / "normals_distill" / f"{frame}.png"
        codes = fitted(read_picture(path, NORMALS_8_BIT), size, path)
        vectors = codes / np.float32(127.5) - 1
        # Black is what an empty picture holds.
        vectors[~np.isin(context, INDOOR_CLASSES) | ~codes.any(axis=2)] = 0
        return normal_map(vectors, repr(str(path)), NORMAL_AXES)

    def _context_classes(self, frame: str, size: tuple[int, int]) -> np.ndarray:
        path = self.root / "pascal-context" / "trainval" / f"{frame}.mat"
        classes = class_codes(read_array(path, "LabelMap"), f"{str(path)!r}, LabelMap")
        wrong = classes[(classes < 0) | (classes > NUM_CONTEXT_CLASSES)]
        if wrong.size:
            raise BadSampleError(
                f"{str(path)!r}: LabelMap holds class id {wrong[0]}; ids are 0 to {NUM_CONTEXT_CLASSES}."
            )
        return fitted(classes, size, path)

    def _parts(self, frame: str, size: tuple[int, int]) -> Tensor | None:
        path = self.root / "human_parts" / f"{frame}.mat"
        anno: Any = read_array(path, "anno")
        label = None
        try:
            for person in anno["objects"][0, 0].flat:
                if int(person["class_ind"].item()) != PERSON:
                    continue
                for part in person["parts"].flat:
                    mask, name = part["mask"].astype(bool), str(part["part_name"].item())
                    label = np.zeros(mask.shape, dtype=np.int64) if label is None else label
                    label[mask] = PART_IDS[name]
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise BadSampleError(
                f"{str(path)!r}: is no annotation of parts ({error!r}); it must have anno.objects with class_ind and "
                f"parts of part_name ({', '.join(sorted(PART_IDS))}) and mask."
            ) from error
        return None if label is None else torch.from_numpy(fitted(label, size, path))


def fitted(array: np.ndarray, size: tuple[int, int], path: Path) -> np.ndarray:
    """The array at the image's height and width, by the nearest pixel.

    Raises:
        BadSampleError: if it has another shape than the image: the same share of height to width, to one pixel.
    """
    height, width = array.shape[:2]
    if (height, width) == size:
        return array
    if abs(height * size[1] - width * size[0]) > max(height, width, *size):
        raise BadSampleError(
            f"{str(path)!r}: is {height} x {width} pixels, but the image is {size[0]} x {size[1]}; a label must have "
            "the image's size, or at least its shape."
        )
    rows, columns = (
        ((np.arange(wanted) + 0.5) * stored / wanted).astype(int)
        for wanted, stored in zip(size, (height, width), strict=True)
    )
    return array[rows][:, columns]


def borders(classes: np.ndarray) -> np.ndarray:
    """(H,W) bool: where the Laplacian of the ids (H,W) is not zero, thinned."""
    # The ids are mirrored at the map's border, as OpenCV does.
    around = np.pad(classes, 1, mode="reflect")
    neighbours = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
    return thin(neighbours != 4 * classes)
