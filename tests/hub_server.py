"""A small model Hub on 127.0.0.1 that the real huggingface_hub client talks to, and the fixture `hub` that starts it.

It keeps models only, in memory, and serves what the client asks for: no Xet, no pull requests, no pages of results.
"""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from hub_repository import File, Repository, is_lfs
from hub_requests import TOKEN, Failure, Handler


class HubServer(ThreadingHTTPServer):
    """`requests` holds (method, path) of every request; `fail`, asked about each, may return how it is to fail."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], Failure] = lambda method, path: False
        self.errors: list[BaseException | None] = []  # mistakes of this file, which clients take for a lost connection
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ends the server and its open connections, which clients keep alive; may be called twice."""
        if self.thread.is_alive():
            self.shutdown()
            self.server_close()
            self.thread.join()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was first

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client may hang up
            self.errors.append(error)

    def put(self, repo_id: str, files: Mapping[str, bytes], revision: str = "main", message: str = "put") -> str:
        """Makes a commit of exactly these files, whatever their names are, and returns its id."""
        repository = self.repositories.setdefault(repo_id, Repository())
        return repository.commit(
            revision, {name: File(data, is_lfs(name, len(data))) for name, data in files.items()}, message
        ).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {name: file.data for name, file in self.repositories[repo_id].find(revision).files.items()}

    def count(self, method: str, pattern: str = "") -> int:
        """How many requests of this method had the pattern in their path."""
        return sum(kind == method and bool(re.search(pattern, path)) for kind, path in self.requests)

    def variables(self, home: Path, offline: bool = False) -> dict[str, str]:
        """What sets a new process to this Hub and no other, with its cache in the folder `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks the Hub for it in a thread
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """The whole environment of such a process: that of this one with the variables above."""
        unset = ("HF_TOKEN_PATH", "HF_ASSETS_CACHE", "TRANSFORMERS_OFFLINE")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        return inherited | self.variables(home, offline)


def use_hub(server: HubServer, patch: pytest.MonkeyPatch, home: Path, offline: bool = False) -> None:
    """Gives this process, which has long imported huggingface_hub, what `environment` gives a new one."""
    for variable, text in server.variables(home, offline).items():
        patch.setenv(variable, text)
    # Everything in huggingface_hub and transformers reads these from the module at each call.
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
    }.items():
        patch.setattr(constants, name, value)
    # The one object through which transformers asks, made at its first call.
    patch.setattr(transformers.utils.hub, "_hf_api", None)
    # huggingface_hub.upload_file and its like are methods of this one object, made at import.
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    # Calls are tried again as ever, only without seconds of waiting in between.
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        patch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    close_session()  # the next one reads the proxy settings anew


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub that this process uses, with an empty cache."""
    server = HubServer()
    use_hub(server, monkeypatch, tmp_path / "hf_home")
    yield server
    close_session()
    server.stop()
    assert not server.errors
