"""examples/export_onnx.py: what ONNX Runtime makes of the file is what torch makes of the model, at sizes that vary.

The program compares by itself too; here the comparison is written once more, and shown to notice a difference.
"""

import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch

from mt_adapters import VtaModel
from programs import EXAMPLES, run_program
from tiny_models import differ, logits_of, make_backbone, make_images, randomize

pytestmark = pytest.mark.slow

TASKS = ["depth", "normals"]
# Tracing takes time per block; Swin keeps one block with shifted windows in both adapted stages.
CHANGES = {"swin": {"depths": [1, 1, 2, 2]}, "dinov2": {"num_hidden_layers": 4}}
# The side that the program checks, and further sizes: with and without padding of patches, windows and merged tokens.
SIDE = {"swin": 70, "dinov2": 56}
# ONNX Runtime for Python 3.10 does not shrink position embeddings.
SIZES = {"swin": [(65, 91), (96, 128)], "dinov2": [(14, 84) if sys.version_info >= (3, 11) else (84, 56), (61, 90)]}


class Exported(NamedTuple):
    family: str
    model: VtaModel
    folder: Path
    session: onnxruntime.InferenceSession
    printed: str


def open_session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def largest_differences(exported: Exported, batch_size: int, size: tuple[int, int]) -> dict[str, float]:
    pixel_values = make_images(size, batch_size)
    expected = logits_of(exported.model, pixel_values)
    found = dict(zip(TASKS, exported.session.run(TASKS, {"pixel_values": pixel_values.numpy()}), strict=True))
    assert {task: logits.shape for task, logits in found.items()} == {
        task: tuple(logits.shape) for task, logits in expected.items()
    }
    return {
        task: float(np.abs(found[task] - logits.numpy()).max() / logits.abs().max())
        for task, logits in expected.items()
    }


@pytest.fixture(scope="module", params=["swin", "dinov2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model whose adapters are random and the file that the program made of it: of Swin's model folder, and of
    DINOv2's adapter folder."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    make_backbone(family, **CHANGES[family]).save_pretrained(folder / "backbone")
    model = randomize(VtaModel.from_backbone(folder / "backbone", tasks=TASKS, decoder_dim=16)).eval()
    model.save_pretrained(folder / "model")
    model.save_adapter(folder / "adapter")
    source = [folder / "model"] if family == "swin" else [folder / "adapter", "--adapter"]
    file = folder / "model.onnx"
    printed = run_program("export_onnx.py", source[0], file, *source[1:], "--image_size", SIDE[family])
    return Exported(family, model, folder, open_session(file), printed)


def test_one_named_output_per_task(exported: Exported) -> None:
    (given,) = exported.session.get_inputs()
    assert (given.name, given.shape) == ("pixel_values", ["batch", 3, "height", "width"])
    assert {output.name: output.shape for output in exported.session.get_outputs()} == {
        "depth": ["batch", 1, "height", "width"],
        "normals": ["batch", 3, "height", "width"],
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_batch_and_image_size_agrees_with_torch(exported: Exported, batch_size: int) -> None:
    for size in SIZES[exported.family]:
        for task, difference in largest_differences(exported, batch_size, size).items():
            assert difference < 1e-4, (task, size)


def test_tasks_and_adapters_matter(exported: Exported) -> None:
    pixel_values = make_images((96, 96), 1)
    depth, normals = exported.session.run(TASKS, {"pixel_values": pixel_values.numpy()})
    assert differ(torch.from_numpy(depth), torch.from_numpy(normals))
    # Heads and decoders differ between tasks anyway; the adapters' own part is what is gone without their affinity.
    model, conditioning = exported.model, exported.model.conditioning
    affinity_TT, weights_TT = conditioning.affinity.clone(), conditioning.mixing_weights.clone()
    conditioning.set_affinity(torch.eye(2), torch.eye(2))
    try:
        changed = logits_of(model, pixel_values)
    finally:
        conditioning.set_affinity(affinity_TT, weights_TT)
    assert differ(torch.from_numpy(depth), changed["depth"])
    assert differ(torch.from_numpy(normals), changed["normals"])


def test_prints_a_table_and_notices_a_difference(exported: Exported) -> None:
    assert "height and width: any from" in exported.printed
    lines = [line.split() for line in exported.printed.splitlines()]
    rows = {tuple(line[:4]): float(line[4]) for line in lines if line and line[0] in TASKS}
    side = SIDE[exported.family]
    sizes = [(side, side), (side + 19, side + 6)]
    assert set(rows) == {(task, batch, str(h), str(w)) for task in TASKS for batch in "13" for h, w in sizes}
    assert 0 < max(rows.values()) < 1e-3

    differences = runpy.run_path(str(EXAMPLES / "export_onnx.py"))["differences"]
    bias = exported.model.heads["depth"].bias
    with torch.no_grad():
        shift = 0.01 * logits_of(exported.model, make_images((side, side)))["depth"].abs().max()
        bias += shift
        found = differences(exported.model, exported.session, 2, (side, side))
        bias -= shift
    assert found["depth"] > 1e-3 > found["normals"]


@pytest.mark.parametrize("exported", ["swin"], indirect=True)
def test_swin_at_its_pretraining_size_is_fixed(exported: Exported) -> None:
    file = exported.folder / "fixed.onnx"
    printed = run_program("export_onnx.py", exported.folder / "model", file, "--image_size", 64)
    assert "height and width: fixed at 64 x 64" in printed
    fixed = exported._replace(session=open_session(file))
    assert fixed.session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    for batch_size in (1, 3):
        assert max(largest_differences(fixed, batch_size, (64, 64)).values()) < 1e-4
    # Hence the other file would not do at this size.
    assert max(largest_differences(exported, 1, (64, 64)).values()) > 1e-4
