"""How much of a server one request may take, and all of them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from step35_trt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


class ServingLimits(BaseModel):
    """Bounds, kept as parameters of `config.pbtxt`, where an operator may change them.

    Attributes:
        prompt_bytes: Of `text_input`, checked before it is decoded or tokenised.
        prompt_tokens: Of the prompt.
        output_tokens: Of the answer; asking for more is an error, not a shorter answer.
        words: Entries of `stop_words` and of `bad_words`.
        word_bytes: Of one entry.
        sequences: Requests that run at the same time.
        ahead: Requests admitted beyond those, so that none is waited for; further ones stay in Triton's
            queue, where its priorities, time-outs and size limit act.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt_bytes: int = Field(gt=0)
    prompt_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    words: int = Field(default=16, ge=0)
    word_bytes: int = Field(default=256, gt=0)
    sequences: int = Field(default=32, gt=0)
    ahead: int = Field(default=4, ge=0)

    @classmethod
    def of(cls, max_tokens: int, sequences: int) -> ServingLimits:
        """Limits that let through whatever fits a context of `max_tokens`.

        A token of text is 3 to 4 bytes long on average; 16 leaves room for any prompt that could fit.
        """
        return cls(
            prompt_bytes=16 * max_tokens,
            prompt_tokens=max_tokens - 1,
            output_tokens=max_tokens,
            sequences=sequences,
        )

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> ServingLimits:
        """From the parameters of `config.pbtxt`, which are texts.

        Raises:
            UsageError: one is missing or no number in its range.
        """
        known = {name: parameters[name] for name in cls.model_fields if name in parameters}
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise UsageError(f"config.pbtxt: parameter {first['loc'][0]}: {first['msg']}") from None
