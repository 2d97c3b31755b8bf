"""The README of a repository: how it is started, asked and limited."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.triton_repo.config_text import DEFAULT_PRIORITY, PRIORITY_LEVELS, QUEUE_SECONDS, QUEUE_SIZE
from step35_trt.triton_repo.tensors import INPUTS, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.triton_repo.tensors import Tensor

_TEXT = """\
# Step 3.5 Flash on Triton

`{engine}` takes text or token ids; `{tokens}` takes token ids under the names of TensorRT-LLM's token-level
model. Both are one engine: the bundle at `{bundle}` is loaded once, from there.

## Start

Triton's Python backend runs the first `python3` of its PATH, which must be of the version its stub was built
for and have `step35-trt` installed. (Or pack such an environment with conda-pack and name it in
`{engine}/config.pbtxt` as the parameter `EXECUTION_ENV_PATH`.)

With the server of the wheel `nvidia-pytriton`, which needs no container:

    pip install 'step35-trt[triton-server]'
    step35-trt serve REPOSITORY

With one of NVIDIA's containers, in which `pip install step35-trt` has been run:

    tritonserver --model-repository REPOSITORY \\
      --http-address 127.0.0.1 --grpc-address 127.0.0.1 --metrics-address 127.0.0.1

Servers before 24.12 hand arrays to numpy 1 only (`pip install 'numpy<2'`), later ones to numpy 2 as well.
Whoever can reach the ports can use the model; these commands open them to this machine alone.

## Ask

    curl -s 127.0.0.1:8000/v2/models/{engine}/generate \\
      -d '{{"text_input": "def read(self, size=-1):", "max_tokens": 32}}'
    curl -sN 127.0.0.1:8000/v2/models/{engine}/generate_stream \\
      -d '{{"text_input": "def read(self, size=-1):", "max_tokens": 32, "stream": true}}'

The models are decoupled: over gRPC, use the client's streams; over HTTP, `generate` and `generate_stream`.
A misspelt field is an error, and so is every wish that the engine cannot grant.

| input | type | |
|---|---|---|
{inputs}

| output | type | |
|---|---|---|
{outputs}

## Priorities, time-outs, cancellation

Priorities go from 1 (first) to {levels}; {default} is the default. {queue} requests of each wait at most. One
that waits longer than {seconds} s or than its own `timeout` (microseconds) is refused; once it runs, that
counts anew and ends it with an error. HTTP's `generate` has no priorities, and a `timeout` in its JSON counts
only from where a request begins to run.

Cancelling a gRPC stream, or going away while an answer is streamed, ends the request within a second. Two
kinds of clients are not noticed, and their answers are made to the end: those of `{tokens}`, since Triton
tells no running step of an ensemble, and those that wait for a whole answer over HTTP, since the server does
not read meanwhile. A `timeout` bounds both.

## Triton's OpenAI front end

    python3 openai_frontend/main.py --model-repository REPOSITORY --tokenizer {bundle}/tokenizer \\
      --backend tensorrtllm --host 127.0.0.1

It renders the chat template of that tokenizer and sends `text_input`, `max_tokens`, `stop_words`, `top_p`,
`temperature`, `seed`, `stream`, the penalties (only 0), `exclude_input_in_output` and the two `return_num_`
inputs; it reads `text_output`, `num_input_tokens` and `num_output_tokens`. It has no parser for this model's
tool calls and reasoning, which stay in the text.

## Limits

Parameters of `{engine}/config.pbtxt`:

{limits}

`tritonserver` has its own limit for a request's body, 64 MB by default (`--http-max-input-size`, in servers
that have it).

## Metrics

Besides Triton's own, at port 8002: `step35_requests`, `step35_tokens`, `step35_steps`,
`step35_drafted_tokens` and `step35_accepted_tokens` (by MTP head), `step35_open_requests`,
`step35_cache_rows`.
"""


def readme(engine: str, tokens: str, parameters: Mapping[str, str]) -> str:
    """The text.

    Args:
        engine: Name of the model that holds the bundle.
        tokens: Name of the token-level model.
        parameters: Of the engine's `config.pbtxt`.
    """
    return _TEXT.format(
        engine=engine,
        tokens=tokens,
        bundle=parameters["bundle"],
        inputs=_rows(INPUTS),
        outputs=_rows(OUTPUTS),
        levels=PRIORITY_LEVELS,
        default=DEFAULT_PRIORITY,
        queue=QUEUE_SIZE,
        seconds=QUEUE_SECONDS,
        limits="\n".join(f"- `{key}`: {value}" for key, value in parameters.items() if key != "bundle"),
    )


def _rows(tensors: Sequence[Tensor]) -> str:
    return "\n".join(f"| `{t.name}` {list(t.dims)} | {t.kind} | {t.meaning} |" for t in tensors)
