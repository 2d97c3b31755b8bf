from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import step35_trt.nano
from step35_trt import console
from step35_trt.errors import UsageError
from step35_trt.runtime.batch_files import batch_lines
from step35_trt.runtime.batch_files.batch import BatchSummary, answer_lines, run_batch
from step35_trt.runtime.dialogue.text import Text
from tests.batches import echo, line, partial, read, write
from tests.texts import ScriptedSession, write_tokenizer

if TYPE_CHECKING:
    from step35_trt.runtime.batch_files.batch_lines import Request

TEMPLATE = (Path(step35_trt.nano.__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def test_answers_in_the_order_of_the_input(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(line(f"r{n}", f"prompt {n} ü") for n in (3, 1, 2)))
    seen: list[BatchSummary] = []
    summary = answer_lines(echo, source, tmp_path / "out", progress=seen.append)
    records = read(tmp_path / "out")
    assert [r["custom_id"] for r in records] == ["r3", "r1", "r2"]
    assert [r["response"]["body"]["choices"][0]["text"] for r in records] == [
        f"prompt {n} ü" for n in (3, 1, 2)
    ]
    assert {r["response"]["status_code"] for r in records} == {200}
    assert {r["error"] for r in records} == {None}
    assert len({r["id"] for r in records}) == 3
    assert (summary.lines, summary.answered, summary.errors) == (3, 3, 0)
    assert (summary.prompt_tokens, summary.generated_tokens) == (30, 6)
    assert [s.lines for s in seen] == [1, 2, 3]
    assert not partial(tmp_path / "out").exists()


BAD = [
    ("not json", "line 2 is not valid JSON"),
    ("[1]", "line 2 is not a JSON object"),
    ('{"custom_id": "b", "body": {"prompt": "x", "temperature": NaN}}', "line 2 is not valid JSON"),
    ('{"body": {"prompt": "x"}}', "line 2 has no custom_id"),
    ('{"custom_id": 7, "body": {"prompt": "x"}}', "line 2 has no custom_id"),
    ('{"custom_id": "", "body": {"prompt": "x"}}', "line 2 has no custom_id"),
    (b'{"custom_id": "\xff\xfe", "body": {}}', "line 2 is not valid JSON"),
    ('{"custom_id": "\\ud800", "body": {}}', "line 2 is not valid JSON"),
    ("[" * 100_000, "line 2 is not valid JSON"),
    ('{"custom_id": "b"}', "body"),
    (line("b", method="GET"), "method"),
    (line("b", url="/v1/embeddings"), "url"),
    (line("b", body=[]), "body"),
    (line("a"), "'a' already"),
    (line("b", "refuse"), "too long"),
]


@pytest.mark.parametrize(("bad", "complaint"), BAD)
def test_a_bad_line_is_answered_in_its_place(tmp_path: Path, bad: str | bytes, complaint: str) -> None:
    source = write(tmp_path / "in", line("a"), bad, line("c"))
    summary = answer_lines(echo, source, tmp_path / "out")
    first, record, last = read(tmp_path / "out")
    assert (first["custom_id"], last["custom_id"]) == ("a", "c")
    assert first["error"] is last["error"] is None
    assert complaint in record["error"]["message"]
    assert "\n" not in record["error"]["message"]
    assert record["response"]["status_code"] == 400
    assert record["response"]["body"]["error"]["message"] == record["error"]["message"]
    assert (summary.answered, summary.errors) == (2, 1)


def test_marks_line_ends_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(
        b"\xef\xbb\xbf"
        + line("a").encode()
        + b"\r\n\r\n  \n"
        + line("b").encode()
        + b"\r\n"
        + line("c").encode()
    )
    assert answer_lines(echo, tmp_path / "in", tmp_path / "out").answered == 3
    assert [r["custom_id"] for r in read(tmp_path / "out")] == ["a", "b", "c"]


def test_an_empty_input(tmp_path: Path) -> None:
    assert answer_lines(echo, write(tmp_path / "in"), tmp_path / "out").lines == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 1000)
    exact = line("b", "y" * (999 - len(line("b", ""))))
    source = write(tmp_path / "in", line("a", "x" * 5_000_000), exact, exact + " " * 5000, line("c"))
    answer_lines(echo, source, tmp_path / "out")
    records = read(tmp_path / "out")
    assert [r["custom_id"] for r in records] == [None, "b", None, "c"]
    assert records[0]["error"]["message"] == "line 1 is longer than 1000 bytes"


def test_the_input_is_streamed(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "in").open("w") as source:
        for n in range(300):
            source.write(line(f"r{n}", "x" * 100_000) + "\n")

    def brief(request: Request, tag: str) -> dict[str, Any]:
        return {}

    tracemalloc.start()
    try:
        answer_lines(brief, tmp_path / "in", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_paths_that_do_not_work(tmp_path: Path) -> None:
    source = write(tmp_path / "in", line("a"))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "in.partial", line("a"))
    for given_in, given_out, complaint in (
        (tmp_path / "none", tmp_path / "out", "cannot read"),
        (tmp_path / "folder", tmp_path / "out", "cannot read"),
        (source, tmp_path / "none" / "out", "does not exist"),
        (source, tmp_path / "folder", "is no file"),
        (source, source, "both input and output"),
        (tmp_path / "in.partial", source, "both input and output"),
    ):
        with pytest.raises(UsageError, match=complaint):
            answer_lines(echo, given_in, given_out)
    assert not partial(tmp_path / "out").exists()
    (tmp_path / "utf16").write_bytes(line("a").encode("utf-16"))
    with pytest.raises(UsageError, match="UTF-16"):
        answer_lines(echo, tmp_path / "utf16", tmp_path / "out")
    assert not partial(tmp_path / "out").exists()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is no file"):
        answer_lines(echo, source, tmp_path / "pipe")


def test_requests_through_a_pipe(tmp_path: Path) -> None:
    """Which can be read once: counting its lines for the progress would take them."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(line("a").encode() + b"\n"))
    with console.line_progress("answering", tmp_path / "pipe"):
        writer.start()
        assert answer_lines(echo, tmp_path / "pipe", tmp_path / "out").answered == 1
    writer.join(10)


def test_a_batch_with_a_session(tmp_path: Path) -> None:
    text = Text.load(write_tokenizer(tmp_path / "tokenizer", TEMPLATE))

    def reply(prompt: str) -> str:
        return "hm\n</think>\nHello." if prompt.endswith("<think>\n") else " two three"

    def chat(custom_id: str, **body: Any) -> str:
        messages = [{"role": "user", "content": "hi"}]
        return json.dumps(
            {"custom_id": custom_id, "url": "/v1/chat/completions", "body": {"messages": messages} | body}
        )

    source = write(
        tmp_path / "in",
        chat("chat"),
        chat("seeded", temperature=1, seed=3, model="mine"),
        chat("n", n=2),
        line("prompt", "one", url="/v1/completions"),
        line("ids", body={"prompt": text.encode("one"), "max_tokens": 3}),
        line("url", "one", url="/v1/chat/completions"),
        line("long", "word " * 500),
        chat("wrong", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    )
    summaries = [
        run_batch(ScriptedSession(text, reply, 400), text, source, tmp_path / name, draft_tokens=drafts)
        for name, drafts in (("a", 0), ("b", 2))
    ]
    with pytest.raises(UsageError, match="from 0 to 3"):
        run_batch(ScriptedSession(text, reply), text, source, tmp_path / "c", draft_tokens=4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    records = {r["custom_id"]: r["response"] for r in read(tmp_path / "a")}
    assert {k for k, r in records.items() if r["status_code"] == 400} == {"n", "url", "long", "wrong"}
    assert records["chat"]["body"]["choices"][0]["message"]["content"] == "Hello."
    assert records["seeded"]["body"]["model"] == "mine"
    assert records["prompt"]["body"]["choices"][0]["text"] == " two three"
    assert records["ids"]["body"]["choices"][0]["finish_reason"] == "length"
    usages = [r["body"]["usage"] for r in records.values() if r["status_code"] == 200]
    assert summaries[0].prompt_tokens == sum(u["prompt_tokens"] for u in usages)
    assert summaries[0].generated_tokens == sum(u["completion_tokens"] for u in usages)
