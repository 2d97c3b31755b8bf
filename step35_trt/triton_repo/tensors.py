"""The tensors of the model: names that TensorRT-LLM's clients know, in Triton's types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["STRING", "BOOL", "INT32", "UINT64", "FP32"]


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: As in requests.
        kind: Triton's data type without `TYPE_`.
        dims: Without the batch dimension, which is 1; -1 is any length.
        meaning: One line for the README of a repository.
    """

    name: str
    kind: Kind
    dims: tuple[int, ...]
    meaning: str


# All are optional; a request has either text_input or input_ids.
INPUTS = (
    Tensor("text_input", "STRING", (1,), "the prompt as text, UTF-8"),
    Tensor("input_ids", "INT32", (-1,), "the prompt as token ids, taken as they are"),
    Tensor("input_lengths", "INT32", (1,), "how many of input_ids count; all of them when absent"),
    Tensor("max_tokens", "INT32", (1,), "tokens to generate at most"),
    Tensor("request_output_len", "INT32", (1,), "the same"),
    Tensor("end_id", "INT32", (1,), "the id that ends the answer; -1: none; absent: the checkpoint's"),
    Tensor("stop_words", "STRING", (-1,), "texts that end the answer and are no part of it"),
    Tensor("bad_words", "STRING", (-1,), "texts whose token ids, alone or after a space, are not generated"),
    Tensor("temperature", "FP32", (1,), "0, or absent: the likeliest token"),
    Tensor("top_p", "FP32", (1,), "above 0 up to 1"),
    Tensor("top_k", "INT32", (1,), "0 is off"),
    Tensor("min_p", "FP32", (1,), "0 is off"),
    Tensor("random_seed", "UINT64", (1,), "makes sampled output repeatable"),
    Tensor("seed", "UINT64", (1,), "the same, as Triton's OpenAI front end spells it"),
    Tensor("stream", "BOOL", (1,), "a response for every piece, instead of one"),
    Tensor("return_log_probs", "BOOL", (1,), "whether cum_log_probs is wanted"),
    Tensor("exclude_input_in_output", "BOOL", (1,), "false: text_output begins with the prompt"),
    Tensor("return_num_input_tokens", "BOOL", (1,), "no effect: num_input_tokens is always there"),
    Tensor("return_num_output_tokens", "BOOL", (1,), "no effect: num_output_tokens is always there"),
    Tensor("beam_width", "INT32", (1,), "only 1"),
    Tensor("repetition_penalty", "FP32", (1,), "only 1"),
    Tensor("presence_penalty", "FP32", (1,), "only 0"),
    Tensor("frequency_penalty", "FP32", (1,), "only 0"),
)
# What else an input may say: nothing. Clients send these whether or not they want anything of them.
ONLY = {"beam_width": 1, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}

OUTPUTS = (
    Tensor("text_output", "STRING", (1,), "the answer, or its next piece"),
    Tensor("output_ids", "INT32", (-1, -1), "the token ids of this response, [1, n]"),
    Tensor("sequence_length", "INT32", (-1,), "n, [1]"),
    Tensor("cum_log_probs", "FP32", (-1,), "sum of the answer's log-probabilities; in the last response"),
    Tensor("num_input_tokens", "INT32", (1,), "length of the prompt"),
    Tensor("num_output_tokens", "INT32", (1,), "token ids of this response"),
    Tensor("finish_reason", "STRING", (1,), "stop or length; in the last response"),
)

# The token-level model: the same under a name of its own, with the inputs that TensorRT-LLM requires.
TOKEN_REQUIRED = ("input_ids", "input_lengths", "request_output_len")
TOKEN_OPTIONAL = (
    *("end_id", "temperature", "top_p", "top_k", "min_p", "random_seed", "return_log_probs"),
    *("beam_width", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stream", "stop_words", "bad_words"),
)
TOKEN_OUTPUTS = ("output_ids", "sequence_length", "cum_log_probs")
