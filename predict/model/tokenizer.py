"""Text to token ids and back: SentencePiece or a tokenizer.json, with the added tokens of a folder; streaming."""

import importlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model")  # Hugging Face's name, PaddleNLP's name
JSON_FILE = "tokenizer.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SPACE = "\u2581"  # what SentencePiece writes for a space
REPLACEMENT = "\ufffd"
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerError(ValueError):
    """A tokenizer cannot be found or read; the message says what was found, what is needed and what to do."""


class Processor(Protocol):
    """Plain text to ids of pieces: what :class:`Tokenizer` asks of a SentencePieceProcessor, or of its stand-in."""

    def get_piece_size(self) -> int: ...
    def id_to_piece(self, ids: list[int]) -> list[str]: ...
    def piece_to_id(self, piece: str) -> int: ...
    def is_byte(self, token_id: int) -> bool: ...
    def is_control(self, token_id: int) -> bool: ...
    def is_unknown(self, token_id: int) -> bool: ...
    def bos_id(self) -> int: ...  # this and the next two: -1 where there is none
    def eos_id(self) -> int: ...
    def unk_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """A SentencePiece model, or a tokenizer.json of the same kind, with its added tokens.

    Attributes:
        folder: the folder it was read from (chat templates lie there too).
        config: the parsed tokenizer_config.json, {} where there is none.
        vocab_size: one more than the largest token id; a model needs a vocab_size at least as large.
        longest_piece: characters of the longest piece of the vocabulary.
        bos_token_id, eos_token_id, unk_token_id: None where the tokenizer has none.
        eos_token_ids: every id that ends an answer: eos_token_id and those of generation_config.json.
        add_bos_token: whether :meth:`encode` begins a text with BOS (tokenizer_config.json, true by default).
        special_tokens: literal text -> id of every control token and every added token.
        special_token_names: "bos_token", "eos_token", ... -> literal text, as chat templates call them.
    """

    def __init__(self, processor: Processor, file: Path):
        self._processor = processor
        self._file = file
        self.folder = file.parent
        self.config = read_json(self.folder / "tokenizer_config.json")
        self._read_pieces()
        self._read_added_tokens()
        self._read_special_token_names()
        self._special_pattern = re.compile(
            "|".join(re.escape(literal) for literal in sorted(self.special_tokens, key=len, reverse=True)) or r"(?!)"
        )

    def _read_pieces(self) -> None:
        """Tables over the ids: the piece as shown ("" for a hidden one), its literal text, the byte it stands for."""
        size = self._processor.get_piece_size()
        self._literals: dict[int, str] = dict(enumerate(self._processor.id_to_piece(list(range(size)))))
        self._shown: dict[int, str] = dict(self._literals)
        self._bytes: dict[int, int] = {}
        self.special_tokens: dict[str, int] = {}
        for token_id, piece in self._literals.items():
            if self._processor.is_byte(token_id):
                self._bytes[token_id] = int(piece[1:-1], 16)  # "<0x0A>"
            elif self._processor.is_control(token_id):
                self._shown[token_id] = ""
                self.special_tokens[piece] = token_id
            elif self._processor.is_unknown(token_id):
                self._shown[token_id] = self._processor.decode([token_id])  # " ⁇ " unless the model says otherwise
                self.special_tokens[piece] = token_id
        # What the model does to spaces is not readable without protobuf; one probe shows each.
        self._adds_space = self._pieces_of("a").startswith(SPACE)
        self._adds_second_space = self._pieces_of(" a").startswith(SPACE * 2)  # a Metaspace does not
        self._removes_spaces = SPACE * 2 not in self._pieces_of("a  a")

    def _pieces_of(self, text: str) -> str:
        return "".join(self._literals[token_id] for token_id in self._processor.encode(text))

    def _read_added_tokens(self) -> None:
        """Adds the tokens beyond the model's own vocabulary, and the marks that make a piece special."""
        for token_id, literal, special in _added_tokens(self._file, self.config):
            self.special_tokens[literal] = token_id
            if self._literals.get(token_id) == literal and not special:
                continue
            if token_id != self._processor.unk_id():
                self._shown[token_id] = "" if special else literal
            self._literals[token_id] = literal
        self.vocab_size = max(self._literals) + 1
        self.longest_piece = max(map(len, self._literals.values()))

    def _read_special_token_names(self) -> None:
        self.special_token_names = {
            name: literal
            for source in (read_json(self.folder / "special_tokens_map.json"), self.config)
            for name in SPECIAL_TOKEN_NAMES
            if (literal := _literal_of(source.get(name))) is not None
        }
        self.bos_token_id = self._named_id("bos_token", self._processor.bos_id())
        self.eos_token_id = self._named_id("eos_token", self._processor.eos_id())
        self.unk_token_id = self._named_id("unk_token", self._processor.unk_id())
        self.add_bos_token = bool(self.config.get("add_bos_token", True)) and self.bos_token_id is not None
        generation_eos = read_json(self.folder / "generation_config.json").get("eos_token_id")
        listed = generation_eos if isinstance(generation_eos, list) else [generation_eos]
        self.eos_token_ids = tuple(dict.fromkeys(i for i in (self.eos_token_id, *listed) if i is not None))

    def _named_id(self, name: str, default: int) -> int | None:
        literal = self.special_token_names.get(name)
        if literal is None:
            if default < 0:
                return None
            self.special_token_names[name] = self._literals[default]
            return default
        token_id = self.special_tokens.get(literal, self._processor.piece_to_id(literal))
        if self._literals.get(token_id) != literal:
            raise TokenizerError(
                f"{self.folder} names {literal!r} as its {name}, which is neither in the tokenizer's vocabulary nor "
                "among the added tokens: the files belong to different models"
            )
        return token_id

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of ``text``.

        Args:
            add_bos: begin with BOS, where the tokenizer does that at all (``add_bos_token``); never twice.
            parse_special: the text was written by a template, not by a user: literals such as "</s>" become their
                tokens, and the text between them is encoded as :meth:`encode_segments` says. Otherwise they are
                plain characters.

        Raises:
            ValueError: the text has a lone surrogate, which has no UTF-8 form.
        """
        ids = self.encode_segments(self.split_special(text)) if parse_special else self._encode_text(text)
        if add_bos and self.add_bos_token and not (parse_special and ids[:1] == [self.bos_token_id]):
            return [self.bos_token_id, *ids]  # type: ignore[list-item]  # add_bos_token implies a BOS
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cuts ``text`` at the literals of the special tokens: plain text as str, special tokens as ids."""
        segments: list[str | int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            segments += [text[end : match.start()], self.special_tokens[match.group()]]
            end = match.end()
        segments.append(text[end:])
        return [segment for segment in segments if segment != ""]

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """The ids of a text given as plain segments (str) and special tokens (their ids), no BOS added.

        SentencePiece puts its prefix space before each segment; one that begins with a space itself keeps a single one:
        "[/INST] answer" and a segment " answer" after a special token both have one space before "answer".
        """
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            elif self._adds_space and segment.startswith(" "):
                ids += self._encode_text(segment[1:] if self._adds_second_space or segment == " " else segment)
            else:
                ids += self._encode_text(segment)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
                "which is no character"
            ) from None
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``, as SentencePiece decodes it (its prefix space dropped at the very start).

        Ids that the model has but the tokenizer has not (padding rows of the embedding) give no text.

        Args:
            skip_special_tokens: leave control tokens and special added tokens out; otherwise write their literals.

        Raises:
            ValueError: an id is negative.
        """
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, ids)) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for by itself: its text or literal, or the one byte; b"" for an id without a piece."""
        byte = self._bytes.get(token_id)
        return bytes([byte]) if byte is not None else self._literals.get(token_id, "").replace(SPACE, " ").encode()

    def continuation(
        self, prompt_ids: Sequence[int], output_ids: Iterable[int], skip_special_tokens: bool = True
    ) -> str:
        """The exact text ``output_ids`` add after ``prompt_ids``: decode(prompt) + continuation == decode(both)."""
        detokenizer = IncrementalDetokenizer(self, prompt_ids, skip_special_tokens)
        return "".join(map(detokenizer.push, output_ids)) + detokenizer.finish()


class IncrementalDetokenizer:
    """The text of a growing sequence of tokens, handed out as soon as it is certain; never half a character.

    With ``prompt_ids`` the text continues theirs, so a first piece keeps its leading space. Without (an answer of a
    chat) the text is a new one, and SentencePiece's prefix space at its start is dropped. Byte tokens are joined into
    UTF-8; a byte that can no longer become part of a character is U+FFFD, as in SentencePiece's own decode. A prompt
    that ends inside a character leaves that character to the token that completes it.

    Args:
        tokenizer: whose tokens these are.
        prompt_ids: tokens already shown.
        skip_special_tokens: as in :meth:`Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), skip_special_tokens: bool = True):
        self._shown = tokenizer._shown if skip_special_tokens else tokenizer._literals
        self._bytes = tokenizer._bytes
        self._removes_spaces = tokenizer._removes_spaces
        self._drops_space = tokenizer._adds_space or tokenizer._removes_spaces
        self._pending = b""
        for token_id in prompt_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that became certain with ``token_id``: "" while a character is incomplete.

        Raises:
            ValueError: the id is negative.
        """
        byte = self._bytes.get(token_id)
        if byte is not None:
            self._drops_space = False
            self._pending += bytes([byte])
            return self._complete_characters()
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        before = self.finish()
        piece = self._shown.get(token_id, "")
        if self._drops_space and piece:
            self._drops_space = False
            if piece.startswith(SPACE):
                piece = piece[1:]
                self._drops_space = self._removes_spaces and not piece  # such models drop every leading space
        return before + piece.replace(SPACE, " ")

    def finish(self) -> str:
        """What is left at the end: U+FFFD for every byte of a character that was never completed."""
        left = REPLACEMENT * len(self._pending)
        self._pending = b""
        return left

    def _complete_characters(self) -> str:
        text = ""
        while self._pending:
            try:
                text += self._pending.decode()
                self._pending = b""
            except UnicodeDecodeError as error:
                text += self._pending[: error.start].decode()
                self._pending = self._pending[error.start :]
                if error.reason == "unexpected end of data":
                    break
                text += REPLACEMENT
                self._pending = self._pending[1:]
        return text


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or of a remote model.

    Args:
        path_or_name: a folder with a SentencePiece file (tokenizer.model, or PaddleNLP's sentencepiece.bpe.model) or,
            where there is none, a tokenizer.json (read by the optional package ``tokenizers``); or
            "organisation/model" for PaddleNLP to download (the only case that uses the network).

    Raises:
        TokenizerError: nothing there, a tokenizer.json of a kind that no Mixtral has or without the package that reads
            it, or a damaged file.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return _read_tokenizer(_tokenizer_file(folder))
    if folder.exists():
        raise TokenizerError(f"{folder} is a file: give the folder that holds the tokenizer")
    if isinstance(path_or_name, str) and HUB_NAME.fullmatch(path_or_name):
        return _read_tokenizer(_paddlenlp_sentencepiece_file(path_or_name))
    raise TokenizerError(
        f"{path_or_name} does not exist: give a folder with a tokenizer.model, or a remote model as organisation/model"
    )


def _tokenizer_file(folder: Path) -> Path:
    names = (*SENTENCEPIECE_FILES, JSON_FILE)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise TokenizerError(
        f"{folder} has no tokenizer: looked for {', '.join(names)}; put the model's tokenizer.model there"
    )


def _read_tokenizer(file: Path) -> Tokenizer:
    if file.name == JSON_FILE:
        from predict.model.tokenizer_json import JsonProcessor  # it imports this module

        return Tokenizer(JsonProcessor(file), file)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(
            f"{file} is not a SentencePiece model ({file.stat().st_size} bytes; {error}): download it again, or, where "
            "a Git LFS pointer was fetched instead, run `git lfs pull`"
        ) from error
    return Tokenizer(processor, file)


def _paddlenlp_sentencepiece_file(name: str) -> Path:
    """Lets PaddleNLP's AutoTokenizer find and download a model's tokenizer; returns its SentencePiece file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log = importlib.import_module("paddlenlp.utils.log").logger
            transformers = importlib.import_module("paddlenlp.transformers")
    except ImportError as error:
        raise TokenizerError(
            f"{name} is no folder, and the remote tokenizer of that name needs PaddleNLP ({error}): "
            "`pip install paddlenlp==2.8.1`, or give a folder with a tokenizer.model"
        ) from error
    log.disable()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a download and foreign configuration files can raise
        raise TokenizerError(
            f"{name} is no folder, and PaddleNLP cannot load a tokenizer of that name: give a folder with a "
            f"tokenizer.model ({type(error).__name__}: {error})"
        ) from error
    finally:
        log.enable()
    file = getattr(tokenizer, "vocab_file", None)
    if file is None:
        raise TokenizerError(
            f"{name} has a {type(tokenizer).__name__}, which is no SentencePiece tokenizer: a Mixtral model needs one"
        )
    return Path(file)


def _added_tokens(file: Path, config: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(id, literal, special) of every added token: added_tokens.json, overridden by added_tokens_decoder (knows more).

    A folder with neither (newer checkpoints) has them in tokenizer.json, which always counts if it is the tokenizer.
    """
    folder = file.parent
    try:
        added = {int(i): (literal, True) for literal, i in read_json(folder / "added_tokens.json").items()}
        described = list(config.get("added_tokens_decoder", {}).items())
        if file.name == JSON_FILE or not (added or described):
            listed = read_json(folder / JSON_FILE).get("added_tokens", [])
            described = [*((token["id"], token) for token in listed), *described]
        added |= {int(i): (token["content"], bool(token.get("special", False))) for i, token in described}
    except TokenizerError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{folder} describes its added tokens in a way that is not Hugging Face's ({type(error).__name__}: {error})"
        ) from error
    return [(token_id, literal, special) for token_id, (literal, special) in added.items() if literal]


def _literal_of(token: Any) -> str | None:
    """The text of a special token as configuration files write it: a string, {"content": ...} or null."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds a {type(content).__name__}, needs an object")
    return content
