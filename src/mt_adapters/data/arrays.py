"""Stored arrays, of NumPy and MATLAB, to labels in our units; what is wrong with one is said as in `pictures`."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mt_adapters.data.pictures import BadSampleError, read_file

INSTALL = 'pip install "mt-adapters[datasets]"'
# Ours: a stored vector that is shorter has no label, and one that is longer than 1 by more is another encoding.
HALF_LENGTH = 0.5


def read_array(path: Path, variable: str) -> np.ndarray:
    """The array of a file .npy, or a variable of a MATLAB file .mat up to version 7.

    Raises:
        BadSampleError: if the file is missing or damaged, or has no such variable.
        ImportError: if a .mat is read without scipy.
    """
    stored, name = io.BytesIO(read_file(path)), repr(str(path))
    if path.suffix == ".npy":
        try:
            # Without pickle a file can hold numbers only.
            return np.load(stored, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadSampleError(f"{name}: is no whole .npy file of numbers ({error}); get the file again.") from error
    try:
        import scipy.io
    except ImportError as error:
        raise ImportError(f"reading {name} needs scipy: {INSTALL}") from error
    try:
        variables = scipy.io.loadmat(stored)
    except (scipy.io.matlab.MatReadError, ValueError, TypeError, OSError, NotImplementedError, zlib.error) as error:
        raise BadSampleError(f"{name}: is no whole MATLAB file ({error}); get the file again.") from error
    if variable not in variables:
        found = [key for key in variables if not key.startswith("__")]
        raise BadSampleError(f"{name}: has the variables {found}; it must have {variable!r}.")
    return np.asarray(variables[variable])


class Hdf5File:
    """A file of arrays that each process opens when it first reads from it.

    An open file must neither be pickled nor shared with a forked process.
    """

    def __init__(self, path: Path) -> None:
        try:
            import h5py  # noqa: F401
        except ImportError as error:
            raise ImportError(f"reading {str(path)!r} needs h5py: {INSTALL}") from error
        self.path = path
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def read(self, variable: str, index: int, dtype: type[np.generic], num_dims: int) -> np.ndarray:
        """`variable[index]`.

        Raises:
            BadSampleError: if the file is missing or damaged, or the variable is, or is of another type or shape.
        """
        name = f"{str(self.path)!r}, {variable}[{index}]"
        try:
            array = self._file()[variable][index]
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise BadSampleError(f"{name}: cannot be read ({error}); get the file again.") from error
        if array.dtype != dtype or array.ndim != num_dims:
            raise BadSampleError(
                f"{name}: is {array.dtype} of shape {array.shape}; it must be {np.dtype(dtype)} with {num_dims} axes."
            )
        return array

    def _file(self) -> Any:
        import h5py

        if self._opened is None or self._opened[0] != os.getpid():
            # First let go of what a parent process has opened: HDF5 would share it.
            self._opened = None
            self._opened = (os.getpid(), h5py.File(self.path, "r"))
        return self._opened[1]


def one_channel(array: np.ndarray) -> np.ndarray:
    """(H,W) of (H,W) or (H,W,1)."""
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def class_codes(array: np.ndarray, name: str) -> np.ndarray:
    """Ids (H,W), which MATLAB often stores as floating point, to int64."""
    if array.ndim != 2 or array.dtype.kind not in "iuf" or not (array % 1 == 0).all():
        raise BadSampleError(f"{name}: is {array.dtype} of shape {array.shape}; it must be (H,W) whole numbers.")
    return array.astype(np.int64)


def depth_map(array: np.ndarray, name: str) -> Tensor:
    """Metres, 0 = no label, to float32 (H,W)."""
    depth = one_channel(array)
    if depth.ndim != 2 or depth.dtype.kind != "f" or not ((depth >= 0) & (depth < np.inf)).all():
        raise BadSampleError(f"{name}: must be depth in metres, floating point (H,W), 0 where there is none.")
    return torch.from_numpy(depth.astype(np.float32))


def edge_map(array: np.ndarray, name: str) -> Tensor:
    """Edges in [0,1] to float32 (H,W)."""
    edges = one_channel(array)
    if edges.ndim != 2 or edges.dtype.kind not in "biuf" or not ((edges >= 0) & (edges <= 1)).all():
        raise BadSampleError(f"{name}: must be edges (H,W) in [0,1].")
    return torch.from_numpy(edges.astype(np.float32))


def normal_map(vectors: np.ndarray, name: str, axes: tuple[int, int, int]) -> Tensor:
    """Vectors (H,W,3) to unit vectors float32 (3,H,W), zeros = no label; `axes` as in `unit_vectors`."""
    if vectors.ndim != 3 or vectors.shape[2] != 3 or vectors.dtype.kind != "f":
        raise BadSampleError(
            f"{name}: is {vectors.dtype} of shape {vectors.shape}; it must be floating point (H,W,3)."
        )
    normals = torch.from_numpy(np.ascontiguousarray(vectors.transpose(2, 0, 1), dtype=np.float32))
    lengths = normals.norm(dim=0)
    worst = lengths.nan_to_num(torch.inf).max().item()
    if worst > 1 + HALF_LENGTH:
        raise BadSampleError(f"{name}: holds a vector of length {worst:.2f}; it must hold unit vectors.")
    normals *= torch.tensor(axes)[:, None, None] / lengths.clamp(min=HALF_LENGTH)
    normals[:, lengths < HALF_LENGTH] = 0
    return normals
