"""How the Hub of the tests answers its requests: their addresses are those that huggingface_hub asks for."""

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repository import Answer, File, Repository, card_errors, is_lfs

TOKEN, USER = "hf_of_the_tests", "tester"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
# How a request fails: dropped without an answer (True), with this status (int), or its answer breaks off ("cut").
Failure = bool | int | str

ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Answer]]] = []


def route(
    methods: str, pattern: str, writes: bool = False
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Registers a method of `Handler`; `REPO` and `REV` stand for a repository and a revision that must exist."""
    pattern = pattern.replace("REPO", "(?P<repo>[^/]+/[^/]+?)").replace("REV", "(?P<revision>[^/]+)")

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((methods, re.compile(pattern), writes, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    server: Any  # a HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        failure: Failure = False
        with self.server.lock:
            if url.path == "/api/agent-harnesses":  # which the client asks for on its own account
                answer = Answer(404, {})
            else:
                path = unquote(url.path)
                self.server.requests.append((self.command, path))
                failure = self.server.fail(self.command, path)
                if failure is True:
                    self.close_connection = True
                    return
                if isinstance(failure, int) and failure:
                    answer = Answer(failure, {"error": "failed on purpose"})
                else:
                    answer = self._answer(url.path)
        self._send(answer, cut=failure == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sizes = iter(lambda: int(self.rfile.readline(), 16), 0)
        body = b"".join(self.rfile.read(size + 2)[:-2] for size in sizes)
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, cut: bool) -> None:
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        if cut:
            self.close_connection = True

    def _answer(self, path: str) -> Answer:
        try:
            given = self.headers.get("Authorization")
            self.is_user = given == f"Bearer {TOKEN}"
            if given is not None and not self.is_user:
                raise Answer(401, {"error": "Invalid credentials in Authorization header"})
            for methods, pattern, writes, function in ROUTES:
                if self.command in methods.split() and (found := pattern.fullmatch(path)):
                    return function(
                        self, **self._find({k: unquote(v) for k, v in found.groupdict("").items()}, writes)
                    )
            return Answer(404, {"error": f"This Hub does not know {self.command} {path}"})
        except Answer as error:
            return error

    def _find(self, groups: dict[str, str], writes: bool) -> dict[str, str]:
        """Sets the repository and the revision that the path names and returns the rest of it."""
        if "repo" in groups:
            self.repo_id = groups.pop("repo")
            found = self.server.repositories.get(self.repo_id)
            # Like the real Hub, which does not tell a stranger what exists.
            if found is None or ((found.private or writes) and not self.is_user):
                raise Answer(404 if self.is_user else 401, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
            self.repository = found
        elif writes and not self.is_user:
            raise Answer(401, {"error": "Invalid username or password."})
        if "revision" in groups:
            self.revision = groups.pop("revision")
            self.commit = self.repository.find(self.revision)
        return groups

    @property
    def _json(self) -> Any:
        return json.loads(self.body or b"{}")

    @route("GET", "/api/whoami-v2", writes=True)
    def whoami(self) -> Answer:
        return Answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> Answer:
        errors = card_errors(self._json["content"])
        return Answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    @route("POST", "/api/repos/create", writes=True)
    def create(self) -> Answer:
        payload = self._json
        if payload.get("type", "model") != "model":
            return Answer(400, {"error": "This Hub keeps models only"})
        repo_id = f"{payload.get('organization') or USER}/{payload['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            return Answer(409, answer | {"error": "You already created this model repo"})
        repository = Repository(private=payload.get("visibility") == "private")
        repository.commit("main", {".gitattributes": File(ATTRIBUTES, False)}, "initial commit")
        self.server.repositories[repo_id] = repository
        return Answer(200, answer)

    @route("POST", "/api/models/REPO/branch/(?P<name>[^/]+)", writes=True)
    def branch(self, name: str) -> Answer:
        if name in self.repository.branches:
            return Answer(409, {"error": "Reference already exists"})
        self.repository.branches[name] = self.repository.find(self._json.get("startingPoint", "main")).id
        return Answer(200, {})

    @route("POST", "/api/models/REPO/tag/REV", writes=True)
    def tag(self) -> Answer:
        if self._json["tag"] in self.repository.tags:
            return Answer(409, {"error": "Tag already exists"})
        self.repository.tags[self._json["tag"]] = self.commit.id
        return Answer(200, {})

    @route("GET", "/api/models/REPO/refs")
    def refs(self) -> Answer:
        kinds = {"branches": ("heads", self.repository.branches), "tags": ("tags", self.repository.tags)}
        listed = {
            kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in names.items()]
            for kind, (folder, names) in kinds.items()
        }
        return Answer(200, listed | {"converts": []})

    @route("GET", "/api/models/REPO(/revision/(?P<name>[^/]+))?")
    def info(self, name: str) -> Answer:
        commit = self.repository.find(name or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(file.data), "blobId": file.blob_id}
                if file.lfs:
                    size = len(file.pointer)
                    sibling["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": size}
        content = {"id": self.repo_id, "sha": commit.id, "private": self.repository.private, "siblings": siblings}
        return Answer(200, content | {"author": self.repo_id.split("/")[0], "tags": [], "downloads": 0, "likes": 0})

    def _entries(self) -> list[dict[str, Any]]:
        entries = []
        for path, file in self.commit.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.data)}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
            entries.append(entry)
        folders = {path[:at] for path in self.commit.files for at, letter in enumerate(path) if letter == "/" and at}
        return entries + [
            {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
            for path in sorted(folders)
        ]

    @route("GET", "/api/models/REPO/tree/REV(/(?P<folder>.+))?")
    def tree(self, folder: str) -> Answer:
        prefix = folder + "/" if folder else ""
        inside = [entry for entry in self._entries() if entry["path"].startswith(prefix)]
        if folder and not inside:
            return Answer(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
        if self.query.get("recursive") != ["true"]:
            inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(prefix)]
        return Answer(200, inside)

    @route("POST", "/api/models/REPO/paths-info/REV")
    def paths_info(self) -> Answer:
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return Answer(200, [entry for entry in self._entries() if entry["path"] in wanted])

    @route("GET HEAD", "/REPO/resolve/REV/(?P<path>.+)")
    def resolve(self, path: str) -> Answer:
        headers: dict[str, object] = {"X-Repo-Commit": self.commit.id, "Accept-Ranges": "bytes"}
        file = self.commit.files.get(path)
        if file is None:
            return Answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{file.blob_id}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": len(file.data)}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return Answer(200, file.data, headers)
        first, last = int(span[1]), min(int(span[2] or len(file.data)), len(file.data) - 1)
        if first > last:
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(file.data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        return Answer(206, file.data[first : last + 1], headers)

    @route("POST", "/api/models/REPO/preupload/REV", writes=True)
    def preupload(self) -> Answer:
        hosted = self.commit.files.get(".gitignore", File(b"", False)).data.decode()
        ignored = [line for line in self._json.get("gitIgnore", hosted).splitlines() if line and line[0] != "#"]
        answers = []
        for asked in self._json["files"]:
            path, old = asked["path"], self.commit.files.get(asked["path"])
            names = (path, path.rsplit("/", 1)[-1])
            answer = {
                "path": path,
                "uploadMode": "lfs" if is_lfs(path, asked["size"]) else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(name, line) for line in ignored for name in names),
            }
            # By this the client knows which files it need not send again.
            answers.append(answer | ({"oid": old.sha256 if old.lfs else old.blob_id} if old else {}))
        return Answer(200, {"files": answers})

    @route("POST", "/REPO.git/info/lfs/objects/batch", writes=True)
    def batch(self) -> Answer:
        objects = []
        for asked in self._json["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.repository.objects:
                place = f"{self.server.url}/lfs/{self.repo_id}"
                upload = {"href": f"{place}/{asked['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify", "header": {}}}
            objects.append(answer)
        return Answer(200, {"transfer": "basic", "objects": objects})

    # Sent without a token, like to the signed addresses of a bucket; private repositories are not protected here.
    @route("PUT", "/lfs/(?P<place>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, place: str, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return Answer(400, {"error": "The bytes do not have this sha256"})
        self.server.repositories[place].objects[oid] = self.body
        return Answer(200, b"")

    @route("POST", "/lfs/REPO/verify", writes=True)
    def lfs_verify(self) -> Answer:
        found = self.repository.objects.get(self._json["oid"])
        is_there = found is not None and len(found) == self._json["size"]
        return Answer(200, {}) if is_there else Answer(404, {"error": "Object not found"})

    @route("POST", "/api/models/REPO/commit/REV", writes=True)
    def post_commit(self) -> Answer:
        if self.revision not in self.repository.branches:
            return Answer(400, {"error": "Commits go to a branch"})
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        expected = header["value"].get("parentCommit")
        if expected is not None and not self.commit.id.startswith(expected):
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(self.commit.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        commit = self.repository.commit(self.revision, files, header["value"]["summary"])
        url = f"{self.server.url}/{self.repo_id}/commit/{commit.id}"
        return Answer(200, {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, File], kind: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if kind == "file":
            files[path] = File(base64.b64decode(value["content"], validate=True), False)
        elif kind == "lfsFile":
            data = self.repository.objects.get(value["oid"])
            if data is None or len(data) != value.get("size", len(data)):
                raise Answer(400, {"error": f"The LFS object of {path} was not uploaded"})
            files[path] = File(data, True)
        elif kind in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/"
            gone = [name for name in files if (name.startswith(inside) if kind == "deletedFolder" else name == path)]
            if not gone:
                error = {"error": "A file with this name doesn't exist"}
                raise Answer(404, error, {"X-Error-Code": "EntryNotFound"})
            for name in gone:
                del files[name]
        else:
            raise Answer(400, {"error": f"This Hub does not know the operation {kind}"})
