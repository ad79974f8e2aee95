"""The Hub of the tests, as the real huggingface_hub client sees it."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    model_info,
    snapshot_download,
    upload_file,
    upload_folder,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from transformers import AutoConfig, AutoModel, ViTConfig

from hub_server import HubServer, use_hub

REPO = "org/model"
FILES = {"config.json": b"{}", "sub/notes.txt": b"some notes", "sub/large.txt": b"0123456789" * 500}
WEIGHTS = {"model.safetensors": b"weights"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "to_upload"
    for name, data in (FILES | WEIGHTS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client, and an empty repository that it has made."""
    api = HfApi(endpoint=hub.url)
    api.create_repo(REPO)
    return api


def read(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_repository_is_made_once(hub: HubServer, api: HfApi) -> None:
    assert list(hub.files(REPO)) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo("of_the_user").repo_id == "tester/of_the_user"
    assert set(hub.repositories) == {REPO, "tester/of_the_user"}


def test_only_its_owner_sees_a_private_repository(api: HfApi) -> None:
    api.create_repo("org/hidden", private=True)
    assert api.model_info("org/hidden").private
    assert not api.model_info(REPO).private
    assert api.repo_exists(REPO, token=False)
    assert not api.repo_exists("org/hidden", token=False)


def test_a_folder_comes_back_as_it_was_uploaded(hub: HubServer, api: HfApi, folder: Path) -> None:
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    expected = FILES | WEIGHTS | {".gitattributes": hub.files(REPO)[".gitattributes"]}
    assert hub.files(REPO) == expected
    assert read(snapshot_download(REPO)) == expected
    assert hub.count("GET", "/resolve/") == len(expected)
    assert sorted(api.list_repo_files(REPO)) == sorted(expected)
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == commit.oid
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert {name: sibling.size for name, sibling in siblings.items()} == {n: len(d) for n, d in expected.items()}
    assert {name for name, sibling in siblings.items() if sibling.lfs} == {"sub/large.txt", "model.safetensors"}
    assert hub.count("PUT", "/lfs/") == 2


def test_the_tree_is_listed_whole_or_by_folder(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    api = HfApi(endpoint=hub.url)
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {"config.json", "sub"}
    assert {entry.path for entry in api.list_repo_tree(REPO, "sub")} == {"sub/notes.txt", "sub/large.txt"}
    assert {entry.path for entry in api.list_repo_tree(REPO, recursive=True)} == {"sub", *FILES}
    assert {entry.path for entry in api.get_paths_info(REPO, ["sub", "config.json", "no"])} == {"sub", "config.json"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "no"))


def test_unchanged_files_are_not_uploaded_again(hub: HubServer, api: HfApi, folder: Path) -> None:
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert (hub.count("PUT"), hub.count("POST", "/commit/")) == (0, 0)
    (folder / "model.safetensors").write_bytes(b"other weights")
    second = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert second.oid != first.oid
    assert (hub.count("PUT"), hub.count("POST", "/commit/")) == (1, 1)
    assert hub.repositories[REPO].commits[second.oid].parent == first.oid
    assert hub.files(REPO, first.oid)["model.safetensors"] == b"weights"
    assert hub.files(REPO)["model.safetensors"] == b"other weights"


def test_a_commit_adds_and_deletes(hub: HubServer) -> None:
    hub.put(REPO, FILES | WEIGHTS)
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("sub/"),
    ]
    HfApi(endpoint=hub.url).create_commit(REPO, operations, commit_message="some")
    assert hub.files(REPO) == {"config.json": b"{}", "new.txt": b"new"}


def test_a_commit_with_one_impossible_operation_does_nothing(hub: HubServer) -> None:
    commit = hub.put(REPO, FILES)
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("no.txt")]
    with pytest.raises(EntryNotFoundError):
        HfApi(endpoint=hub.url).create_commit(REPO, operations, commit_message="some")
    assert model_info(REPO).sha == commit
    assert hub.files(REPO) == FILES


def test_a_commit_onto_an_outdated_parent_is_refused(hub: HubServer, api: HfApi) -> None:
    parent = hub.put(REPO, FILES)
    newer = hub.put(REPO, WEIGHTS)
    with pytest.raises(HfHubHTTPError) as caught:
        upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO, parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert model_info(REPO).sha == newer
    upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO, parent_commit=newer)
    assert hub.files(REPO) == WEIGHTS | {"new.txt": b"new"}


def test_the_gitignore_of_a_repository_is_followed(hub: HubServer, folder: Path) -> None:
    hub.put(REPO, {".gitignore": b"# these\n*.txt\n"})
    upload_folder(repo_id=REPO, folder_path=folder)
    assert set(hub.files(REPO)) == {".gitignore", "config.json", "model.safetensors"}


def test_a_revision_is_a_commit_a_tag_or_a_branch(hub: HubServer, api: HfApi) -> None:
    first = hub.put(REPO, {"a.txt": b"1"})
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="feature/one")
    hub.put(REPO, {"a.txt": b"2"})
    upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id=REPO, revision="feature/one")
    found = {r: Path(hf_hub_download(REPO, "a.txt", revision=r)).read_bytes() for r in ("main", first, "v1")}
    assert found == {"main": b"2", first: b"1", "v1": b"1"}
    assert read(snapshot_download(REPO, revision="v1")) == {"a.txt": b"1"}
    assert Path(hf_hub_download(REPO, "a.txt", revision="feature/one")).read_bytes() == b"3"
    refs = api.list_repo_refs(REPO)
    assert {branch.name for branch in refs.branches} == {"main", "feature/one"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    for create in (partial(api.create_tag, REPO, tag="v1"), partial(api.create_branch, REPO, branch="main")):
        create(exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="409"):
            create()


def test_what_is_missing_is_told_apart(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    for repo, name, revision, error in (
        ("org/no", "config.json", "main", RepositoryNotFoundError),
        (REPO, "config.json", "no", RevisionNotFoundError),
        (REPO, "config.json", "0" * 40, RevisionNotFoundError),
        (REPO, "no.json", "main", EntryNotFoundError),
    ):
        with pytest.raises(error) as caught:
            hf_hub_download(repo, name, revision=revision)
        assert not isinstance(caught.value, LocalEntryNotFoundError)  # which is an EntryNotFoundError, too
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/no")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="no")
    with pytest.raises(RepositoryNotFoundError):
        upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id="org/no")
    with pytest.raises(RevisionNotFoundError):
        upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id=REPO, revision="no")


def test_writing_needs_the_right_token(hub: HubServer, api: HfApi) -> None:
    assert api.whoami()["name"] == "tester"
    with pytest.raises(RepositoryNotFoundError):  # what the client makes of a 401, on the real Hub as well
        upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id=REPO, token=False)
    for call in (
        lambda: upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id=REPO, token="wrong"),
        lambda: api.create_repo("org/other", token=False),
        lambda: api.whoami(token="wrong"),
        lambda: api.model_info(REPO, token="wrong"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert set(hub.repositories) == {REPO}


@pytest.mark.parametrize("failure", [True, 403, 500])
def test_a_failed_commit_leaves_the_repository_as_it_was(hub: HubServer, folder: Path, failure: bool | int) -> None:
    commit = hub.put(REPO, {"a.txt": b"1"})
    hub.fail = lambda method, path: failure if "/commit/" in path else False
    with pytest.raises(Exception, match="disconnected" if failure is True else str(failure)):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert model_info(REPO).sha == commit
    assert hub.files(REPO) == {"a.txt": b"1"}
    # What had arrived of large files need not be sent again.
    hub.fail = lambda method, path: False
    hub.requests.clear()
    upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.count("PUT") == 0
    assert hub.files(REPO) == FILES | WEIGHTS | {"a.txt": b"1"}


@pytest.mark.parametrize(("failure", "num_tries"), [(True, 6), (500, 6), (400, 1)])
def test_a_failed_upload_of_the_second_large_file_leaves_the_repository_as_it_was(
    hub: HubServer, folder: Path, failure: bool | int, num_tries: int
) -> None:
    commit = hub.put(REPO, {"a.txt": b"1"})
    puts: list[str] = []

    def fail_second(method: str, path: str) -> bool | int:
        if method == "PUT":
            puts.append(path)
        return failure if method == "PUT" and path != puts[0] else False

    hub.fail = fail_second
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert len(puts) == 1 + num_tries
    assert hub.count("POST", "/commit/") == 0
    assert model_info(REPO).sha == commit
    assert len(hub.repositories[REPO].objects) == 1


def test_large_files_are_checked_against_their_sha256(hub: HubServer, api: HfApi) -> None:
    wrong = get_session().put(f"{hub.url}/lfs/{REPO}/{'0' * 64}", content=b"weights")
    assert wrong.status_code == 400
    assert not hub.repositories[REPO].objects
    headers = {"Authorization": f"Bearer {get_token()}"}
    lines = '{"key": "header", "value": {"summary": "some"}}\n{"key": "lfsFile", "value": {"path": "a", "oid": "0"}}\n'
    answer = get_session().post(f"{hub.url}/api/models/{REPO}/commit/main", content=lines, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "The LFS object of a was not uploaded")
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_a_request_that_fails_once_is_tried_again(hub: HubServer, api: HfApi) -> None:
    hub.fail = lambda method, path: method == "PUT" and hub.count("PUT") == 1
    upload_file(path_or_fileobj=b"0" * 3000, path_in_repo="a.bin", repo_id=REPO)
    assert hub.count("PUT") == 2
    assert hub.files(REPO)["a.bin"] == b"0" * 3000


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: HubServer) -> None:
    hub.put(REPO, {"a.bin": bytes(range(256)) * 20})
    hub.fail = lambda method, path: "cut" if method == "GET" and hub.count("GET", "/resolve/") == 1 else False
    assert Path(hf_hub_download(REPO, "a.bin")).read_bytes() == bytes(range(256)) * 20
    assert hub.count("GET", "/resolve/") == 2


def test_parts_of_a_file_are_served(hub: HubServer) -> None:
    hub.put(REPO, {"a.txt": b"0123456789"})
    url = f"{hub.url}/{REPO}/resolve/main/a.txt"
    for asked, part, content_range in (
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ):
        answer = get_session().get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (206, part, content_range)
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


@pytest.mark.parametrize("name", ["../../outside.txt", "sub/../../outside.txt", "../outside.safetensors"])
def test_hostile_names_are_served_and_the_client_refuses_them(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.put(REPO, {name: b"evil", "a.txt": b"good"})
    assert set(HfApi(endpoint=hub.url).list_repo_files(REPO)) == {name, "a.txt"}
    with pytest.raises(ValueError, match=r"[Ii]nvalid"):
        snapshot_download(REPO)
    assert not list(tmp_path.rglob("outside*"))
    assert b"evil" not in [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cached_snapshot_is_not_fetched_again(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put(REPO, FILES)
    first = snapshot_download(REPO)
    hub.requests.clear()
    assert snapshot_download(REPO) == first
    assert hub.count("GET", "/resolve/") == 0
    use_hub(hub, monkeypatch, tmp_path / "another_cache")
    assert snapshot_download(REPO) != first
    assert hub.count("GET", "/resolve/") == len(FILES)


def test_a_stopped_server_answers_nobody(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    cached = hf_hub_download(REPO, "config.json")
    hub.stop()
    assert hf_hub_download(REPO, "config.json") == cached
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "sub/notes.txt")


def test_a_new_process_uses_this_hub_and_its_own_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.put(REPO, FILES)
    program = f"import huggingface_hub; print(huggingface_hub.snapshot_download({REPO!r}))"

    def run(offline: bool) -> Path:
        environment = hub.environment(tmp_path / "of_the_process", offline)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    snapshot = run(offline=False)
    assert snapshot.is_relative_to(tmp_path / "of_the_process")
    assert read(snapshot) == FILES
    hub.requests.clear()
    assert run(offline=True) == snapshot
    assert not hub.requests


def test_transformers_loads_a_model_from_the_hub_and_then_from_its_cache(
    hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
    )
    model = AutoModel.from_config(config)
    model.push_to_hub(REPO)
    assert {"config.json", "model.safetensors"} <= set(hub.files(REPO))
    assert AutoConfig.from_pretrained(REPO).hidden_size == 8
    assert hub.count("GET", "resolve/.*/model.safetensors") == 0

    def check() -> None:
        loaded = AutoModel.from_pretrained(REPO).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())

    check()
    assert hub.count("GET", "resolve/.*/model.safetensors") == 1
    use_hub(hub, monkeypatch, tmp_path / "hf_home", offline=True)
    hub.requests.clear()
    check()
    assert not hub.requests
    hub.stop()
    check()
    with pytest.raises(OSError, match="cached"):
        AutoConfig.from_pretrained("org/never_seen")
