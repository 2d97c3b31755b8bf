"""Batch files, and something that answers them without a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from step35_trt.errors import DoesNotFitError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.batch_files.batch_lines import Request


def echo(request: Request, tag: str) -> dict[str, Any]:
    """Answers with the prompt; some requests are refused, some take the process down."""
    prompt = request.body.get("prompt", "")
    if prompt == "refuse":
        raise DoesNotFitError("the prompt is too long")
    if prompt == "break":
        raise VerificationError("the logits are not finite")
    if prompt == "interrupt":
        raise KeyboardInterrupt
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 2, "total_tokens": len(prompt) + 2}
    return {"id": f"cmpl-{tag}", "choices": [{"text": prompt}], "usage": usage}


def line(custom_id: str, prompt: str = "x", **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "body": {"prompt": prompt}} | fields)


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
