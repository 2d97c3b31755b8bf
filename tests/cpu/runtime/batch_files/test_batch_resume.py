from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError, Step35Error, UsageError, VerificationError
from step35_trt.runtime.batch_files.batch import answer_lines
from step35_trt.runtime.batch_files.batch_output import ResumableOutput
from tests.batches import echo, line, partial, read, write

if TYPE_CHECKING:
    from step35_trt.runtime.batch_files.batch_lines import Request

ROOT = Path(__file__).parents[4]


def test_what_is_wrong_with_the_model_ends_the_batch(tmp_path: Path) -> None:
    source = write(tmp_path / "in", line("a"), line("b", "break"))
    with pytest.raises(VerificationError):
        answer_lines(echo, source, tmp_path / "out")
    assert len(read(partial(tmp_path / "out"))) == 1


def test_ctrl_c_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", line("a"), line("b", "interrupt"), line("c"))
    with pytest.raises(KeyboardInterrupt):
        answer_lines(echo, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def patient(request: Request, tag: str) -> dict[str, Any]:
        assert request.custom_id != "a"
        return {}

    summary = answer_lines(patient, source, tmp_path / "out")
    assert (summary.lines, summary.resumed) == (3, 1)
    assert [r["custom_id"] for r in read(tmp_path / "out")] == ["a", "b", "c"]


INPUT = [line("a"), "broken", line("a"), line("b", "ü" * 20), line("c", "refuse"), "", line("d")]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_resumes_from_any_byte(tmp_path: Path, data: st.DataObject) -> None:
    source, whole, out = write(tmp_path / "in", *INPUT), tmp_path / "whole", tmp_path / "out"
    if not whole.exists():
        answer_lines(echo, source, whole)
    out.unlink(missing_ok=True)
    expected = whole.read_bytes()
    kept = data.draw(st.integers(0, len(expected)))
    zeros = data.draw(st.sampled_from([0, 0, 7]))
    partial(out).write_bytes(expected[:kept] + b"\0" * zeros)
    summary = answer_lines(echo, source, out)
    assert out.read_bytes() == expected
    assert summary.resumed == expected[:kept].count(b"\n")
    assert (summary.lines, summary.answered, summary.errors) == (6, 3, 3)


def test_a_long_torn_line_is_dropped(tmp_path: Path) -> None:
    source = write(tmp_path / "in", line("a"), line("b", "y" * 300_000))
    answer_lines(echo, source, tmp_path / "whole")
    expected = (tmp_path / "whole").read_bytes()
    partial(tmp_path / "out").write_bytes(expected[:-10])
    assert answer_lines(echo, source, tmp_path / "out").resumed == 1
    assert (tmp_path / "out").read_bytes() == expected


def test_a_finished_output_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *INPUT)
    first = answer_lines(echo, source, tmp_path / "out")
    before = (tmp_path / "out").stat()

    def never(request: Request, tag: str) -> dict[str, Any]:
        raise AssertionError

    again = answer_lines(never, source, tmp_path / "out")
    assert again.already_finished
    assert again.resumed == again.lines == first.lines
    assert (again.errors, again.generated_tokens) == (first.errors, first.generated_tokens)
    assert (tmp_path / "out").stat().st_mtime_ns == before.st_mtime_ns
    assert not partial(tmp_path / "out").exists()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([line("a"), line("other")], "line 2"),
        ([line("a"), line("b", "edited")], "line 2"),
        ([line("a")], "more answers"),
    ],
)
def test_answers_to_another_input_are_not_continued(
    tmp_path: Path, finished: bool, lines: list[str], complaint: str
) -> None:
    out = tmp_path / "out"
    answer_lines(echo, write(tmp_path / "first", line("a"), line("b")), out)
    if not finished:
        out.rename(partial(out))
    held = (out if finished else partial(out)).read_bytes()
    with pytest.raises(UsageError, match=complaint):
        answer_lines(echo, write(tmp_path / "in", *lines), out)
    assert (out if finished else partial(out)).read_bytes() == held


def test_a_finished_output_of_a_shorter_input(tmp_path: Path) -> None:
    answer_lines(echo, write(tmp_path / "first", line("a")), tmp_path / "out")
    with pytest.raises(UsageError, match="ends before line 2"):
        answer_lines(echo, write(tmp_path / "in", line("a"), line("b")), tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"a": 1}\n', b"\n", b'{"id":"batch_req_1"}\n']
)
def test_files_of_other_origin_are_not_touched(tmp_path: Path, content: bytes) -> None:
    for path in (partial(tmp_path / "a"), tmp_path / "b"):
        path.write_bytes(content)
        with pytest.raises(UsageError):
            answer_lines(echo, write(tmp_path / "in", line("a")), tmp_path / path.name[0])
        assert path.read_bytes() == content


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with ResumableOutput(tmp_path / "out"), pytest.raises(UsageError, match="another process"):
        answer_lines(echo, write(tmp_path / "in", line("a")), tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_says_what_is_safe(tmp_path: Path) -> None:
    import resource

    source = write(tmp_path / "in", *(line(f"r{n}") for n in range(50)))
    answer_lines(echo, source, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DoesNotFitError, match="cannot write") as caught:
            answer_lines(echo, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    safe = partial(tmp_path / "out").read_bytes().count(b"\n")
    assert 0 < safe < 50
    assert f"safe ({safe})" in caught.value.hint
    assert answer_lines(echo, source, tmp_path / "out").resumed == safe
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_other_failures_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*paths: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(Step35Error, match="Permission denied") as caught:
        answer_lines(echo, write(tmp_path / "in", line("a")), tmp_path / "out")
    assert "safe (1)" in caught.value.hint


CHILD = """
import sys, time
from pathlib import Path
from step35_trt.runtime.batch_files.batch import answer_lines

def slow(request, tag):
    time.sleep(0.006)
    return {"id": tag, "text": request.body["prompt"] * 40}

answer_lines(slow, Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_at_any_moment_and_run_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(line(f"r{n}", f"{n}ü") if n % 7 else "broken" for n in range(150)))
    command = [sys.executable, "-c", CHILD, str(source)]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    chance, killed, out = random.Random(), 0, tmp_path / "out"
    for _ in range(6):
        before = partial(out).stat().st_size if partial(out).exists() else 0
        child = subprocess.Popen([*command, str(out)], cwd=ROOT)
        while child.poll() is None and not (partial(out).exists() and partial(out).stat().st_size > before):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        if out.exists():
            break
        assert (tmp_path / "whole").read_bytes().startswith(partial(out).read_bytes())
    assert killed
    subprocess.run([*command, str(out)], cwd=ROOT, check=True)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial(out).exists()
