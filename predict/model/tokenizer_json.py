"""Hugging Face's tokenizer.json read by its ``tokenizers`` package, for a folder without a SentencePiece file."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from predict.model.tokenizer import SPACE, TokenizerError, read_json

UNKNOWN_TEXT = " \u2047 "  # what SentencePiece shows for the unknown token
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SUPPORTED = (
    f"only BPE with byte fallback and {SPACE!r} for spaces is read, which every Mixtral has: put the tokenizer.model "
    "of the Mixtral model there"
)
# What belongs to whole sequences is Tokenizer's: BOS, the added tokens (plain text must never become one); and a
# prompt is never cut, filled up or encoded at random, whatever was set when the file was saved.
LEFT_OUT: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


class JsonProcessor:
    """A converted SentencePiece BPE model behind the methods of a SentencePieceProcessor that Tokenizer uses.

    What happens to spaces is what the file says. Its Prepend normalizer is SentencePiece's prefix space exactly. Its
    newer Metaspace gives no second one to a text that has one; its prepend_scheme "first" is "always" here, since
    each text between special tokens is encoded by itself. With neither, a text gets no prefix space.

    Args:
        file: the tokenizer.json.

    Raises:
        TokenizerError: the file is damaged, holds another kind of tokenizer, or ``tokenizers`` is not installed.
    """

    def __init__(self, file: Path):
        content = read_json(file)
        kind = _foreign_kind(content)
        if kind is not None:
            raise TokenizerError(f"{file} is {kind}; {SUPPORTED}")
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ImportError as error:
            raise TokenizerError(
                f"{file} needs the package that reads it ({error}): `pip install tokenizers` (the extra "
                "tokenizer-json), or put the tokenizer.model of the same model beside it"
            ) from error
        content |= LEFT_OUT
        content["model"] = content["model"] | {"dropout": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the package raises no narrower type
            raise TokenizerError(f"{file} is not a readable tokenizer.json ({error}): download it again") from error
        self._ids: dict[str, int] = self._tokenizer.get_vocab()
        self._pieces = {token_id: piece for piece, token_id in self._ids.items()}
        self._unk_id = self._ids.get(content["model"].get("unk_token") or "<unk>", -1)
        if SPACE not in "".join(self._pieces[token_id] for token_id in self.encode("a a")):
            raise TokenizerError(f"{file} is a BPE tokenizer that does not write spaces as {SPACE!r}; {SUPPORTED}")

    def get_piece_size(self) -> int:
        return max(self._pieces) + 1

    def id_to_piece(self, ids: list[int]) -> list[str]:
        """The pieces of ``ids``, "" for an id that the vocabulary skips."""
        return [self._pieces.get(token_id, "") for token_id in ids]

    def piece_to_id(self, piece: str) -> int:
        return self._ids.get(piece, self._unk_id)

    def is_byte(self, token_id: int) -> bool:
        return BYTE_PIECE.fullmatch(self._pieces.get(token_id, "")) is not None

    def is_control(self, token_id: int) -> bool:
        """Whether it is one of Llama's own two; others are among the added tokens of the file, as special."""
        return token_id in (self.bos_id(), self.eos_id())

    def is_unknown(self, token_id: int) -> bool:
        return token_id == self._unk_id

    def bos_id(self) -> int:
        return self._ids.get("<s>", -1)

    def eos_id(self) -> int:
        return self._ids.get("</s>", -1)

    def unk_id(self) -> int:
        return self._unk_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text shown for unknown tokens: the only ones whose text is not in their piece."""
        return UNKNOWN_TEXT * len(ids)


def _foreign_kind(content: dict[str, Any]) -> str | None:
    """What this is, if anything but BPE with byte fallback."""
    model = content.get("model")
    if not isinstance(model, dict):
        return "no tokenizer (it has no model)"
    kind = model.get("type", "BPE")
    if kind != "BPE":
        return f"a {kind} tokenizer"
    stages = json.dumps([content.get(stage) for stage in ("normalizer", "pre_tokenizer", "decoder")])
    if '"type": "ByteLevel"' in stages:  # at whatever depth
        return "a byte-level BPE tokenizer (as GPT-2, Llama 3 and newer Mistral models have)"
    if not model.get("byte_fallback"):
        return "a BPE tokenizer without byte fallback"
    present = sum(BYTE_PIECE.fullmatch(str(piece)) is not None for piece in model.get("vocab") or ())
    return None if present == 256 else f"a BPE tokenizer with {present} of the 256 byte tokens"
