"""`config.pbtxt` in protobuf's text format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from step35_trt.triton_repo.tensors import INPUTS, OUTPUTS, TOKEN_OPTIONAL, TOKEN_OUTPUTS, TOKEN_REQUIRED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.triton_repo.tensors import Tensor

PRIORITY_LEVELS, DEFAULT_PRIORITY = 3, 2
QUEUE_SIZE = 1024  # requests of each priority that wait in Triton
QUEUE_SECONDS = 600  # a request's own time-out can only be shorter
# Where Triton's queue has priorities or time-outs, its batcher does not notice a request that comes while the
# one before is being handed over, until the next one comes or half a second has passed (its source:
# DynamicBatchScheduler::WaitForPayloadSlotAvailable). So those that come together are gathered first.
GATHER_MICROSECONDS = 5_000
GATHERED = 16

_ENGINE = """\
# The inputs are optional, but a request has either text_input or input_ids.
name: {name}
backend: "python"

# So many requests are handed over together; a request with a batch of its own is an error.
max_batch_size: {gathered}

# A request has one response, or with stream several.
model_transaction_policy {{ decoupled: true }}

# The engine makes its batches itself, step by step. Triton's batcher is here for its queue: it holds the
# requests that find no room in the engine, in order of priority (1 first), until their time is up.
dynamic_batching {{
  max_queue_delay_microseconds: {gather}
  priority_levels: {levels}
  default_priority_level: {default}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {microseconds}
    allow_timeout_override: true
    max_queue_size: {queue}
  }}
}}

# One instance: it holds the weights and serves all requests together.
instance_group [ {{ kind: {kind} count: 1 }} ]

# The bundle stays where it is; the others are limits, see README.md.
{parameters}

{inputs}
{outputs}
"""

_TOKENS = """\
# The token-level model: {engine} under the tensor names that TensorRT-LLM's model has.
# Triton does not hand a cancellation on to the running step of an ensemble; where clients cancel, or vanish,
# let them send the same tensors to {engine} itself.
name: {name}
platform: "ensemble"
max_batch_size: 1

{inputs}
{outputs}
ensemble_scheduling {{
  step [ {{
    model_name: {engine}
    model_version: -1
{maps}
  }} ]
}}
"""


def engine_config(name: str, kind: str, parameters: Mapping[str, str]) -> str:
    """The model that holds the bundle.

    Args:
        name: Of the model, its folder's.
        kind: Of the instance: where Triton counts it.
        parameters: What `model.py` reads.
    """
    shown = "\n".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in parameters.items()
    )
    return _ENGINE.format(
        name=json.dumps(name),
        gathered=GATHERED,
        gather=GATHER_MICROSECONDS,
        levels=PRIORITY_LEVELS,
        default=DEFAULT_PRIORITY,
        microseconds=QUEUE_SECONDS * 1_000_000,
        queue=QUEUE_SIZE,
        kind=kind,
        parameters=shown,
        inputs=_tensors("input", INPUTS, " optional: true", " allow_ragged_batch: true"),
        outputs=_tensors("output", OUTPUTS),
    )


def tokens_config(name: str, engine: str) -> str:
    """The token-level model, an ensemble of one step.

    Args:
        name: Of the model, its folder's.
        engine: The model that holds the bundle.
    """
    required = [tensor for tensor in INPUTS if tensor.name in TOKEN_REQUIRED]
    optional = [tensor for tensor in INPUTS if tensor.name in TOKEN_OPTIONAL]
    outputs = [tensor for tensor in OUTPUTS if tensor.name in TOKEN_OUTPUTS]
    maps = [
        f'    {kind}_map {{ key: "{tensor.name}" value: "{tensor.name}" }}'
        for kind, tensors in (("input", [*required, *optional]), ("output", outputs))
        for tensor in tensors
    ]
    return _TOKENS.format(
        name=json.dumps(name),
        engine=json.dumps(engine),
        inputs=_tensors("input", required) + "\n" + _tensors("input", optional, " optional: true"),
        outputs=_tensors("output", outputs),
        maps="\n".join(maps),
    )


def _tensors(field: str, tensors: Sequence[Tensor], ending: str = "", lists: str = "") -> str:
    """Lines of a kind, each with an ending; those of any length with another one besides."""
    return "\n".join(
        f'{field} {{ name: "{tensor.name}" data_type: TYPE_{tensor.kind} dims: {list(tensor.dims)}'
        f"{ending}{lists if tensor.dims == (-1,) else ''} }}"
        for tensor in tensors
    )
