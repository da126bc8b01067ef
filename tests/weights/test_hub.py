"""`hf:` models through the real client of the hub, against a small hub of our own."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from octavo.errors import ConfigError, ModelFileError
from octavo.weights import source
from octavo.weights.hub import HubSpec, RemoteFile, choose_files

OneSentence = Callable[[pytest.ExceptionInfo[ConfigError]], str]


@dataclass
class Repo:
    """A repository of the fake hub; `fault` says how its files are refused or spoilt."""

    files: dict[str, bytes]
    sha: str = "a" * 40
    fault: str = ""

    def entries(self) -> list[dict[str, object]]:
        """What the API lists: large files carry their SHA-256."""
        return [
            {
                "rfilename": path,
                "path": path,
                "type": "file",
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
                "blobId": hashlib.sha1(data).hexdigest(),
                **({"lfs": self._lfs(data)} if path.endswith((".gguf", ".safetensors")) else {}),
            }
            for path, data in self.files.items()
        ]

    def _lfs(self, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        return {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}


@dataclass
class FakeHub:
    """The part of the hub's API that its client asks for, and the requests that came."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(f"{method} {path}")
        parts = unquote(path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        rest = parts[2:] if is_api else parts
        repo = self.repos.get("/".join(rest[:2]))
        if repo is None:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}, b"{}"
        if repo.fault == "gone" or (repo.fault == "broken" and not is_api):
            return 400, {}, b"{}"
        if repo.fault == "no revision":
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if is_api and "tree" in rest:
            return 200, {"Content-Type": "application/json"}, json.dumps(repo.entries()).encode()
        if is_api:
            info = {"id": "/".join(rest[:2]), "sha": repo.sha, "siblings": repo.entries()}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if repo.fault == "gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        data = repo.files["/".join(rest[4:])]
        etag = hashlib.sha1(data).hexdigest()
        if repo.fault == "spoilt":
            data = bytes(len(data))
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": repo.sha}, data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> Iterator[FakeHub]:
    """A running fake hub that HF_ENDPOINT points to."""
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            status, headers, body = fake.answer(self.command, urlsplit(self.path).path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = _reply  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


FOLDER = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights" * 1000,
    "consolidated.safetensors": b"again" * 1000,
    "onnx/model.safetensors": b"other",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x02",
    "README.md": b"# hello",
}


def test_a_folder_comes_without_code(hub: FakeHub, cache_home: Path) -> None:
    hub.repos["org/model"] = Repo(FOLDER)
    seen: list[tuple[str, int, int]] = []
    path = source.resolve("hf:org/model", progress=lambda *args: seen.append(args))
    assert path == cache_home / "models" / "hf--org--model"
    visible = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    assert visible == {
        *("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"),
        "octavo.json",
    }
    assert (path / "model.safetensors").read_bytes() == FOLDER["model.safetensors"]
    assert not any(".py" in line or ".bin" in line for line in hub.requests)
    assert {phase for phase, _, _ in seen} == {"downloading", "checking"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert "modeling_evil" not in sys.modules


def test_the_second_time_needs_no_network(hub: FakeHub) -> None:
    hub.repos["org/model"] = Repo(FOLDER)
    path = source.resolve("hf:org/model")
    hub.requests.clear()
    assert source.resolve("hf:org/model") == path
    assert hub.requests == []
    assert [(m.name, m.path) for m in source.list_models()] == [("hf:org/model", path)]
    source.remove("hf:org/model")
    assert source.list_models() == []
    assert not path.exists()


def test_pull_brings_a_new_revision(hub: FakeHub) -> None:
    repo = hub.repos["org/model"] = Repo(FOLDER)
    path = source.pull("hf:org/model")
    hub.requests.clear()
    source.pull("hf:org/model")
    assert not any("/resolve/" in line for line in hub.requests), "nothing is fetched twice"
    repo.files = FOLDER | {"model.safetensors": b"better" * 1000}
    repo.sha = "b" * 40
    assert source.pull("hf:org/model") == path
    assert (path / "model.safetensors").read_bytes() == b"better" * 1000


def test_a_pull_that_fails_keeps_what_is_there(hub: FakeHub) -> None:
    repo = hub.repos["org/model"] = Repo(FOLDER)
    path = source.pull("hf:org/model")
    repo.fault = "gone"
    with pytest.raises(ConfigError):
        source.pull("hf:org/model")
    assert source.resolve("hf:org/model") == path


def test_one_gguf_file(hub: FakeHub) -> None:
    hub.repos["org/model"] = Repo({"sub/m.Q4_0.gguf": b"GGUF", "m.Q8_0.gguf": b"GGUFGGUF"})
    path = source.resolve("hf:org/model:sub/m.Q4_0.gguf")
    assert path.read_bytes() == b"GGUF"
    other = source.resolve("hf:org/model:m.Q8_0.gguf")
    assert other.read_bytes() == b"GGUFGGUF"
    assert path.exists()
    assert {m.name for m in source.list_models()} == {
        "hf:org/model:sub/m.Q4_0.gguf",
        "hf:org/model:m.Q8_0.gguf",
    }


def test_a_spoilt_download_is_no_model(hub: FakeHub, one_sentence: OneSentence) -> None:
    repo = hub.repos["org/model"] = Repo({"m.gguf": b"GGUF" * 100}, fault="spoilt")
    with pytest.raises(ModelFileError) as caught:
        source.resolve("hf:org/model")
    assert "arrived damaged" in one_sentence(caught)
    assert source.list_models() == []
    repo.fault = ""
    assert source.resolve("hf:org/model").read_bytes() == b"GGUF" * 100


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("gone", "could not be fetched from the hub"),
        ("broken", "could not be fetched from the hub"),
        ("no revision", "no such revision"),
        ("gated", "is gated"),
    ],
)
def test_refusals(hub: FakeHub, one_sentence: OneSentence, fault: str, cause: str) -> None:
    hub.repos["org/model"] = Repo({"m.gguf": b"GGUF"}, fault=fault)
    with pytest.raises(ConfigError) as caught:
        source.resolve("hf:org/model")
    assert cause in one_sentence(caught)
    assert source.list_models() == []


def test_unknown_repository(hub: FakeHub, one_sentence: OneSentence) -> None:
    with pytest.raises(ModelFileError) as caught:
        source.resolve("hf:org/none")
    assert "no repository org/none" in one_sentence(caught)


def test_no_network(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError) as caught:
        source.resolve("hf:org/model")
    assert "HF_ENDPOINT" in one_sentence(caught)


NO_NAMES = """
hf: hf:model hf:a/b/c hf:../b hf:a/.. hf:a+b/c hf:a--b/c hf:/b hf:a/
hf:a/b: hf:a/b:c.bin hf:a/b:../c.gguf hf:a/b:/etc/c.gguf hf:a/b:c//d.gguf hf:a/b:c\\d.gguf
"""


@pytest.mark.parametrize("name", NO_NAMES.split())
def test_names_that_are_none(name: str, cache_home: Path, one_sentence: OneSentence) -> None:
    with pytest.raises(ConfigError) as caught:
        source.resolve(name)
    assert "write hf:org/repo" in one_sentence(caught)
    assert not cache_home.exists()


def remote(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 10, None) for path in paths]


SPEC = HubSpec("hf:org/m", "org/m", None)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (["config.json", "a.safetensors"], ["a.safetensors", "config.json"]),
        (["config.json", *SHARDS, "consolidated.safetensors"], [*SHARDS, "config.json"]),
        (["config.json", "model.safetensors", "m.gguf"], ["config.json", "model.safetensors"]),
        (["config.json", "m.gguf", "mmproj-m.gguf"], ["m.gguf"]),
        (["q/m.gguf", "../m.gguf", "/m.gguf"], ["q/m.gguf"]),
    ],
)
def test_which_files_are_chosen(paths: list[str], chosen: list[str]) -> None:
    assert sorted(file.path for file in choose_files(SPEC, remote(*paths))) == sorted(chosen)


@pytest.mark.parametrize(
    ("spec", "paths", "cause"),
    [
        (SPEC, ["a.gguf", "b.gguf"], "name one: hf:org/m:a.gguf, hf:org/m:b.gguf"),
        (SPEC, ["config.json", "pytorch_model.bin"], "never read"),
        (SPEC, ["README.md"], "neither a GGUF file nor"),
        (SPEC, ["m-00001-of-00002.gguf"], "split GGUF"),
        (HubSpec("", "org/m", "c.gguf"), ["a.gguf"], "no file c.gguf; name one: hf:org/m:a.gguf"),
        (HubSpec("", "org/m", "c.gguf"), ["a.bin"], "no GGUF files at all"),
    ],
)
def test_which_are_not(
    spec: HubSpec, paths: list[str], cause: str, one_sentence: OneSentence
) -> None:
    with pytest.raises(ModelFileError) as caught:
        choose_files(spec, remote(*paths))
    assert cause in one_sentence(caught)
