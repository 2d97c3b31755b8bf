"""A small tokenizer and a session that answers from a script, for tests of what surrounds the model."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from step35_trt.config import Step35Config
from step35_trt.runtime.packing import UNBOUNDED
from step35_trt.runtime.session import Step
from tests.synthetic import raw_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.session import Call, Floats, Ids

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
CONTROL = (BOS, "<|eos|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LINES = [
    f"{n}: {subject} {verb} {rest}"
    for n, (subject, verb, rest) in enumerate(
        (subject, verb, rest)
        for subject in ("The parser", "Ein Übersetzer", "模型", "Модель", "A tool call", "def answer(x):")
        for verb in ("reads", "hält zurück", "生成", "возвращает", "streams", "return")
        for rest in (
            "text in pieces.",
            "ein Stück Text 🙂",
            "一段文字。",
            "<parameter=x>\n{}\n",
            "x + 1  # naïve",
        )
    )
]


@functools.cache
def tokenizer_source() -> str:
    """`tokenizer.json`; markers are declared special, as a checkpoint might."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL + MARKERS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("naïve plain", normalized=False)])
    return str(tokenizer.to_str())


def write_tokenizer(directory: Path, template: str | None = None, **settings: object) -> Path:
    """A directory with the files of a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_source(), encoding="utf-8")
    config = {"bos_token": {"content": BOS, "special": True}, "eos_token": "<|im_end|>"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


class ScriptedSession:
    """A session whose model continues each prompt with the text that `reply` gives for it, then `<|im_end|>`.

    MTP modules draft the very same tokens.
    """

    def __init__(self, text: Text, reply: Callable[[str], str], max_tokens: int = 4096) -> None:
        vocabulary = text.tokenizer.get_vocab_size()
        end = text.tokenizer.token_to_id("<|im_end|>")
        assert end is not None
        self._end = end
        self.config = Step35Config.parse(raw_config(vocab_size=vocabulary, eos_token_id=[self._end]))
        self.max_tokens = max_tokens
        self.prefill_chunk = max_tokens
        self._text, self._reply = text, reply
        self.prompts: list[str] = []
        self.capacity = UNBOUNDED

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> ScriptedSequence:
        return ScriptedSequence(self)

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        return [_own(call).decode(call.token_ids, call.rows) for call in calls]

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        return [_own(call).draft(module, call.token_ids, _hidden(call), call.rows) for call in calls]

    def script(self, prompt_ids: list[int]) -> list[int]:
        prompt = self._text.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        self.prompts.append(prompt)
        reply = self._text.tokenizer.encode(self._reply(prompt), add_special_tokens=False).ids
        return [*prompt_ids, *reply, self._end]


class ScriptedSequence:
    def __init__(self, session: ScriptedSession) -> None:
        self._session = session
        self._script: list[int] | None = None
        self._rows = 0
        self._draft_rows = [0] * session.config.num_nextn_predict_layers

    @property
    def length(self) -> int:
        return self._rows

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        if self._script is None:
            self._script = self._session.script(token_ids.tolist())
        first, self._rows = self._rows, self._rows + len(token_ids)
        return self._step(len(token_ids), first + 1, rows)

    def truncate(self, length: int) -> None:
        self._rows = length

    def draft_length(self, module: int) -> int:
        return self._draft_rows[module]

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        first = self._draft_rows[module]
        self._draft_rows[module] += len(token_ids)
        return self._step(len(token_ids), first + 2 + module, rows)

    def truncate_draft(self, module: int, length: int) -> None:
        self._draft_rows[module] = length

    def close(self) -> None:
        pass

    def _step(self, count: int, shift: int, rows: Ids) -> Step:
        assert self._script is not None
        logits = np.zeros((len(rows), self._session.config.vocab_size), dtype=np.float32)
        for n, row in enumerate(rows):
            place = min(int(row) + shift, len(self._script) - 1)
            logits[n, self._script[place]] = 100.0
        return Step(logits, np.zeros((count, 1), dtype=np.float32))


def _own(call: Call) -> ScriptedSequence:
    assert isinstance(call.sequence, ScriptedSequence)
    return call.sequence


def _hidden(call: Call) -> Floats:
    assert call.hidden is not None
    return call.hidden
