"""A Triton request's tensors in, what the scheduler takes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from step35_trt.errors import UsageError
from step35_trt.runtime.decoding.sampling import SamplingParams, whole
from step35_trt.runtime.scheduling.requests import TokenRequest
from step35_trt.triton_repo.tensors import ONLY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.triton_repo.limits import ServingLimits

    Inputs = Mapping[str, NDArray[Any]]

DEFAULT_OUTPUT_TOKENS = 16  # what the generate extension's clients get when they name no number
# Parameters that mean something: the request's name, and a time-out, see `timeout_of`. Others are errors,
# `priority` too: Triton's queue is ordered by gRPC's, but not by a field of HTTP's generate.
_KNOWN = frozenset({"id", "timeout"})


@dataclass(frozen=True)
class Wanted:
    """A checked request.

    Attributes:
        tokens: For the scheduler.
        stop_strings: Texts that end the answer.
        stream: Whether pieces are wanted.
        prefix: What `text_output` begins with.
    """

    tokens: TokenRequest
    stop_strings: tuple[str, ...] = ()
    stream: bool = False
    prefix: str = ""

    @property
    def log_probabilities(self) -> bool:
        """Whether `cum_log_probs` is wanted."""
        return self.tokens.sampling.log_probabilities


def parse(
    inputs: Inputs,
    parameters: Mapping[str, object],
    text: Text | None,
    stop_ids: Sequence[int],
    limits: ServingLimits,
) -> Wanted:
    """Check the tensors of a request.

    Args:
        inputs: By name, with or without a batch dimension of 1.
        parameters: Of the request; a misspelt field of a JSON request arrives here.
        text: The bundle's tokenizer, if it has one.
        stop_ids: The checkpoint's; `end_id` replaces them.
        limits: The server's.

    Raises:
        UsageError: naming the tensor that is off.
    """
    if unknown := sorted(set(parameters) - _KNOWN):
        raise UsageError(f"{unknown[0]} is no input of this model")
    for name, array in inputs.items():
        if array.ndim > 1 and len(array) != 1:
            raise UsageError(f"{name} is a batch of {len(array)}: send one request for each")
    for name, value in ONLY.items():
        if (given := _one(inputs, name)) is not None and given != value:
            raise UsageError(f"{name} {given} is not supported, only {value}")
    stops, bad = _words(inputs, "stop_words", limits), _words(inputs, "bad_words", limits)
    if text is None and (stops or bad or "text_input" in inputs):
        raise UsageError("this model has no tokenizer: send input_ids, without stop_words and bad_words")
    if stops and _one(inputs, "return_log_probs"):
        raise UsageError("return_log_probs does not go with stop_words: the sum would go beyond the answer")
    prompt, prefix = _prompt(inputs, text, limits)
    if len(prompt) > limits.prompt_tokens:
        raise UsageError(f"the prompt has {len(prompt)} tokens, more than {limits.prompt_tokens}")
    tokens = TokenRequest(
        prompt_ids=prompt,
        max_tokens=_max_tokens(inputs, limits),
        sampling=replace(
            _sampling(inputs),
            bad_words=() if text is None else _bad_ids(bad, text),
            log_probabilities=bool(_one(inputs, "return_log_probs")),
        ),
        stop_ids=_stop_ids(inputs, stop_ids),
    )
    echoes = _one(inputs, "exclude_input_in_output") is False
    return Wanted(tokens, stops, bool(_one(inputs, "stream")), prefix if echoes else "")


def timeout_of(microseconds: int, parameters: Mapping[str, object]) -> float | None:
    """Seconds that a request has; None for no limit.

    Args:
        microseconds: The protocol's time-out, 0 for none.
        parameters: Of the request. HTTP's generate has a time-out only here.

    Raises:
        UsageError: it is no number above 0.
    """
    given = parameters.get("timeout", microseconds or None)
    if given is None:
        return None
    if not whole(given) or not isinstance(given, int) or given <= 0:
        raise UsageError(f"timeout must be a whole number of microseconds above 0, not {given!r}")
    return given / 1e6


def _one(inputs: Inputs, name: str) -> Any:
    """The element of a tensor that has one; None where it is not there."""
    array = inputs.get(name)
    if array is None:
        return None
    if array.size != 1:
        raise UsageError(f"{name} has {array.size} elements instead of 1")
    return array.item()


def _prompt(inputs: Inputs, text: Text | None, limits: ServingLimits) -> tuple[list[int], str]:
    """Ids, and the text they came from."""
    if ("text_input" in inputs) == ("input_ids" in inputs):
        raise UsageError("a request has either text_input or input_ids")
    if text is not None and "text_input" in inputs:
        raw = _one(inputs, "text_input")
        if len(raw) > limits.prompt_bytes:
            raise UsageError(f"text_input has {len(raw)} bytes, more than {limits.prompt_bytes}")
        prompt = _utf8(raw, "text_input")
        return text.encode(prompt), prompt
    ids = inputs["input_ids"].ravel()
    count = _one(inputs, "input_lengths")
    if count is not None and not 0 < count <= ids.size:
        raise UsageError(f"input_lengths is {count}, but input_ids has {ids.size} elements")
    listed: list[int] = ids[:count].tolist()
    if not listed:
        raise UsageError("the prompt is empty")
    return listed, ""


def _max_tokens(inputs: Inputs, limits: ServingLimits) -> int:
    given = [name for name in ("max_tokens", "request_output_len") if name in inputs]
    if len(given) > 1:
        raise UsageError("max_tokens and request_output_len say the same: send one of them")
    count: int = _one(inputs, given[0]) if given else min(DEFAULT_OUTPUT_TOKENS, limits.output_tokens)
    if not 0 < count <= limits.output_tokens:
        raise UsageError(f"{given[0]} must lie between 1 and {limits.output_tokens}, not {count}")
    return count


def _sampling(inputs: Inputs) -> SamplingParams:
    if "random_seed" in inputs and "seed" in inputs:
        raise UsageError("random_seed and seed say the same: send one of them")
    named = {name: _one(inputs, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    named["seed"] = _one(inputs, "random_seed" if "random_seed" in inputs else "seed")
    return SamplingParams(**{name: value for name, value in named.items() if value is not None})


def _stop_ids(inputs: Inputs, usual: Sequence[int]) -> tuple[int, ...]:
    end: int | None = _one(inputs, "end_id")
    if end is None:
        return tuple(usual)
    if end < -1:
        raise UsageError(f"end_id must be a token id or -1, not {end}")
    return (end,) if end >= 0 else ()


def _words(inputs: Inputs, name: str, limits: ServingLimits) -> tuple[str, ...]:
    """The entries of a list; an empty one stands for none, since a tensor cannot be empty in JSON."""
    raw = [word for word in inputs[name].ravel() if word] if name in inputs else []
    if len(raw) > limits.words:
        raise UsageError(f"{name} has {len(raw)} entries, more than {limits.words}")
    if any(len(word) > limits.word_bytes for word in raw):
        raise UsageError(f"{name} has an entry of more than {limits.word_bytes} bytes")
    return tuple(_utf8(word, name) for word in raw)


def _bad_ids(words: Sequence[str], text: Text) -> tuple[tuple[int, ...], ...]:
    """A word's ids differ at the beginning of a text and after a space."""
    spelt = (tuple(text.ids(form)) for word in words for form in (word, f" {word}"))
    return tuple(dict.fromkeys(ids for ids in spelt if ids))


def _utf8(raw: object, name: str) -> str:
    if isinstance(raw, str):
        return raw
    assert isinstance(raw, bytes)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
