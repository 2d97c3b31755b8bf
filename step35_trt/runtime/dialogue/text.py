"""Text in and out of the model: ids from text, text from ids while they arrive (specification 6)."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from tokenizers import Tokenizer, decoders

from step35_trt.errors import CorruptInputError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# The answer's grammar (specification 6): to be read even where the checkpoint declares them special.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>", "</parameter>")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one character: itself if it can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Text:
    """A checkpoint's tokenizer and what its files say about text.

    Attributes:
        tokenizer: The byte-level BPE of `tokenizer.json`.
        special_tokens: Texts by role (`bos_token`, `eos_token`, ...) from `tokenizer_config.json`.
        bos_id: The id every prompt begins with; None where the files name none.
        hidden: Ids that decode to nothing: special tokens other than the answer's markers.
        chat_template: Source of the Jinja template; None where the checkpoint has none.
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    bos_id: int | None
    hidden: frozenset[int]
    chat_template: str | None

    @classmethod
    def load(cls, directory: Path) -> Text:
        """Read `tokenizer.json` and, where they are, `tokenizer_config.json` and `chat_template.jinja`.

        Raises:
            CorruptInputError: a file is missing, unreadable or contradicts another.
            UnsupportedError: the tokenizer is not byte-level.
        """
        path = directory / "tokenizer.json"
        source = _read(path)
        if source is None:
            raise CorruptInputError(f"{directory} has no tokenizer.json", "Copy it from the checkpoint.")
        try:
            tokenizer = Tokenizer.from_str(source)
        except Exception as error:  # the library raises plain Exception
            raise CorruptInputError(f"{path} is not a tokenizer: {error}") from None
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise UnsupportedError(f"{path} is not a byte-level tokenizer, which Step 3.5 Flash has")
        tokenizer.no_truncation()  # training leftovers that would silently shorten a prompt
        tokenizer.no_padding()
        config = _tokenizer_config(directory / "tokenizer_config.json")
        special = {
            key: text for key, value in config.items() if key.endswith("_token") and (text := _token(value))
        }
        bos = special.get("bos_token") if config.get("add_bos_token") is not False else None
        bos_id = tokenizer.token_to_id(bos) if bos else None
        if bos and bos_id is None:
            raise CorruptInputError(f"tokenizer_config.json names the bos_token {bos!r}, which {path} lacks")
        added = tokenizer.get_added_tokens_decoder()
        return cls(
            tokenizer=tokenizer,
            special_tokens=special,
            bos_id=bos_id,
            hidden=frozenset(
                i for i, token in added.items() if token.special and token.content not in MARKERS
            ),
            chat_template=_read(directory / "chat_template.jinja") or _template(config.get("chat_template")),
        )

    def encode(self, prompt: str) -> list[int]:
        """Ids of `prompt`, beginning with the bos id exactly once whether or not the text has it.

        Raises:
            UsageError: the text holds half a surrogate pair.
        """
        ids = self.ids(prompt)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def ids(self, text: str) -> list[int]:
        """Ids of `text` alone.

        Raises:
            UsageError: the text holds half a surrogate pair.
        """
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise UsageError("the prompt holds half a surrogate pair, which is no text") from None
        return ids

    def detokenizer(self) -> Detokenizer:
        """Start decoding one answer."""
        return Detokenizer(self)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for, perhaps a part of a character; none for a hidden id."""
        if token_id in self.hidden or (token := self.tokenizer.id_to_token(token_id)) is None:
            return b""
        try:
            return bytes(_BYTES[char] for char in token)
        except KeyError:  # an added token, which is kept as plain text
            return token.encode()


class Detokenizer:
    """Decodes ids as they arrive; what it has returned never changes.

    The pieces and `finish` joined are `Text.decode` of all ids: a character is held until its last byte.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes."""
        return self._utf8.decode(self._text.token_bytes(token_id))

    def finish(self) -> str:
        """What is left of a character that was never completed: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CorruptInputError(f"{path} cannot be read: {error}") from None


def _tokenizer_config(path: Path) -> dict[str, Any]:
    if (source := _read(path)) is None:
        return {}
    try:
        config = from_json(source)
    except ValueError as error:
        raise CorruptInputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CorruptInputError(f"{path} does not hold an object")
    return config


def _token(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _template(value: object) -> str | None:
    """A template, or the one called `default` in a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CorruptInputError(
            "tokenizer_config.json: chat_template is neither a text nor a list of named texts"
        )
    return value
