"""Rules for every test: offline, seeded, and skipped (or failed) when weights, data or a GPU are missing."""

import importlib.util
import ipaddress
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# huggingface_hub and transformers read these when they are imported, and pytest imports this file before any test.
# A fresh HF_HOME keeps the user's cache and token out.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=tempfile.mkdtemp(prefix="mt_adapters_tests_"),
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    # Tiny models spend their time in waking threads; this is for the programs that tests start.
    OMP_NUM_THREADS="1",
)
torch.set_num_threads(1)

pytest_plugins = ["programs", "hub_server", "furniture_library"]

REPOSITORY = Path(__file__).parents[1]
SHARED_FOLDER = Path(os.environ.get("MT_ADAPTERS_SHARED", REPOSITORY / "../shared")).resolve()
SHARED_PARTS = ("models/dinov2-small", "data/rooms", "reference")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def _skip_or_fail(reason: str, required: str) -> None:
    """Skips the test, or fails it where the variable `required` is 1."""
    if os.environ.get(required) == "1":
        pytest.fail(f"{required}=1, so this test may not be skipped: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    missing = [part for part in SHARED_PARTS if not (SHARED_FOLDER / part).is_dir()]
    if item.get_closest_marker("pretrained") and missing:
        _skip_or_fail(
            f"set MT_ADAPTERS_SHARED to a folder that holds {', '.join(SHARED_PARTS)} (missing: {', '.join(missing)})",
            required="MT_ADAPTERS_REQUIRE_PRETRAINED",
        )
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    missing += [] if CHROMIUM else ["a Chromium"]
    if item.get_closest_marker("browser") and missing:
        _skip_or_fail(
            f"pip install gradio playwright, and put a Chromium on the PATH (missing: {', '.join(missing)})",
            required="MT_ADAPTERS_REQUIRE_BROWSER",
        )
    if item.get_closest_marker("render") and importlib.util.find_spec("mitsuba") is None:
        _skip_or_fail("pip install mitsuba", required="MT_ADAPTERS_REQUIRE_RENDER")


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder with pretrained weights, the full rooms set and reference tensors; for tests marked `pretrained`."""
    return SHARED_FOLDER


@pytest.fixture(scope="session")
def chromium() -> str | None:
    """The browser's program; for tests marked `browser`."""
    return CHROMIUM


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _is_local(sock: socket.socket, address: object) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0] if isinstance(address, tuple) else None
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _local_only(connect: Callable) -> Callable:
    def guarded(sock: socket.socket, address: object) -> object:
        if not _is_local(sock, address):
            raise RuntimeError(f"tests run offline, but something tried to reach {address}")
        return connect(sock, address)

    return guarded


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Let sockets of this process reach this machine only; child processes rely on the offline variables above."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name)))
        yield
