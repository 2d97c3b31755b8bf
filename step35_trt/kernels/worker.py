"""The process that compiles: reads one request a line, answers one line.

It alone calls Triton's compiler, because that can abort, and because it has to see the kernels as sources to
compile while the caller may hold them interpreted (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Serve requests from standard input until it ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # the compiler prints; answers have a channel of their own
        serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer each request with the facts of the compiled kernel or with `error`."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = compile_one(request)
        except Exception as error:  # any failure of the compiler is one kernel's
            answer = {"error": first_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """Compile and write `kernel.ptx` and `kernel.cubin` into the request's folder."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from step35_trt.kernels.plugin import load

    module = load(request["plugin"], request["module"], Path(request["root"]))
    function = getattr(module, request["function"])
    signature, constants = request["signature"], request["constants"]
    names = function.arg_names
    if set(names) != signature.keys() | constants.keys() or signature.keys() & constants.keys():
        odd = sorted(set(names) ^ (signature.keys() | constants.keys()) | signature.keys() & constants.keys())
        raise ValueError(f"arguments of {request['function']} and of the variant differ: {', '.join(odd)}")
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in request["aligned"]},
    )
    options = {"num_warps": request["num_warps"], "num_stages": request["num_stages"]}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = triton.compile(source, target=GPUTarget("cuda", request["capability"], 32), options=options)
    folder = Path(request["folder"])
    (folder / "kernel.ptx").write_text(made.asm["ptx"], encoding="utf-8")
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    facts = made.metadata
    return {
        "entry": facts.name,
        "arguments": [(name, signature[name]) for name in names if name in signature],
        "num_warps": facts.num_warps,
        "shared_bytes": facts.shared,
        "scratch_bytes": facts.global_scratch_size,
        "log": log.getvalue(),
    }


def first_line(error: BaseException) -> str:
    """What the compiler complains about: the innermost cause's line that says so."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() and not line.startswith("Internal Triton")]
    return (telling or lines or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
