"""Where results go: files, links, pipes."""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.journal import replacing, staged

if TYPE_CHECKING:
    from pathlib import Path


def test_a_pipe_is_written_and_stays_one(tmp_path: Path) -> None:
    path, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    with replacing(path) as stream:
        stream.write(b"all of it")
    reader.join(10)
    assert got == [b"all of it"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


def test_a_linked_file_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for content in (b"first", b"second"):
        with replacing(tmp_path / "link") as stream:
            stream.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_bytes() == content


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a directory"), replacing(tmp_path):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_to_the_result(tmp_path: Path, there: bool) -> None:
    """Whether it leads to an empty directory or to nothing yet; it is written where it will lie."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "bundle", tmp_path / "link"
    if there:
        target.mkdir()
    link.symlink_to(target)
    with staged(link, "key", {"file": 1}) as (stage, journal):
        assert stage.parent == tmp_path / "disk"
        (stage / "file").write_bytes(b"1")
        journal.finish("file")
    assert link.is_symlink()
    assert (link / "file").read_bytes() == b"1"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["bundle"]


def test_what_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="GB more"), staged(tmp_path / "out", "key", {"a/b": 10**18}):
        pass
    assert not list(tmp_path.iterdir())


def test_what_fails_elsewhere_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"/nowhere/file: No such file"),
        staged(tmp_path / "out", "key", {}),
    ):
        open("/nowhere/file", "rb")  # noqa: SIM115
