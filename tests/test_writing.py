"""Files that are written: each as it was or complete, whatever is there and whatever fails."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from ciuic_compile.writing import write_file, write_files


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_files_are_replaced_and_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    write_files({str(tmp_path / "a"): "new", str(tmp_path / "b"): b"bytes"})
    assert contents(tmp_path) == {"a": "new", "b": "bytes"}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("fails", ["a", "b", "c"])
@pytest.mark.parametrize("links", [True, False])
def test_where_one_cannot_be_moved_all_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, links: bool
) -> None:
    (tmp_path / "a").write_text("old a")
    (tmp_path / "c").write_text("old c")
    replace = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == fails and source.endswith(".tmp"):
            raise OSError(28, "No space left on device", source, None, target)
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    if not links:
        monkeypatch.setattr("os.link", lambda source, target: os.stat(tmp_path / "no hard links"))
    with pytest.raises(OSError, match="No space left") as caught:
        write_files({str(tmp_path / name): "new" for name in "abc"})
    assert caught.value.filename == str(tmp_path / fails)
    assert contents(tmp_path) == {"a": "old a", "c": "old c"}


def test_what_could_not_be_put_back_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old a")
    replace = os.replace

    def broken(source: str, target: str) -> None:
        if Path(target).name == "b" or source.endswith(".old"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_files({str(tmp_path / name): "new" for name in "ab"})
    assert sorted(contents(tmp_path).values()) == ["new", "old a"]


def test_special_files_stay_what_they_are(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    text = "x" * 200_000  # more than a pipe holds
    write_files({str(pipe): text, str(tmp_path / "a"): "new"})
    reader.join(timeout=10)
    assert read == [text.encode()] and stat.S_ISFIFO(pipe.stat().st_mode)
    assert (tmp_path / "a").read_text() == "new"


def test_a_link_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)  # so that nobody waits
    try:
        write_file(tmp_path / "link", "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()


def test_an_open_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    stream = os.open(tmp_path / "out.txt", os.O_CREAT | os.O_RDWR)
    try:
        os.write(stream, b"before, ")
        write_file(f"/dev/fd/{stream}", "text")
        os.write(stream, b", after")
    finally:
        os.close(stream)
    assert contents(tmp_path) == {"out.txt": "before, text, after"}


def test_a_pipe_that_nobody_reads_leaves_the_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_text("old")
    open_ = os.open
    monkeypatch.setattr("os.open", lambda path, flags: open_(path, flags | os.O_NONBLOCK))
    with pytest.raises(OSError, match="No such device") as caught:
        write_files({str(tmp_path / "a"): "new", str(tmp_path / "pipe"): "text"})
    assert caught.value.filename == str(tmp_path / "pipe")
    assert (tmp_path / "a").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a", "pipe"]


def test_a_links_target_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "link").symlink_to("folder/file")
    (tmp_path / "dangling").symlink_to("folder/later")
    write_files({str(tmp_path / "link"): "new", str(tmp_path / "dangling"): "made"})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert contents(tmp_path / "folder") == {"file": "new", "later": "made"}


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        write_file(tmp_path / "a", "text")
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").is_symlink() and len(os.listdir(tmp_path)) == 2
