"""Chat messages to token ids: the checkpoint's Jinja template, the user's own, or the built-in Mixtral-Instruct format.

What a message says never becomes a control token. A template may write special tokens as text ("</s>", bos_token, and
in newer vocabularies "[INST]"), and the rendered text is cut at all of them; so before rendering, wherever a string of
the messages contains such a literal, its first character is replaced by a private-use character that occurs nowhere
else, and put back in the plain text between the special tokens afterwards. Other text reaches the template unchanged.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from predict.model.tokenizer import Tokenizer, read_json

BUILT_IN = "mixtral"
PRIVATE_USE = 0xF0000  # the first of 65,534 characters without a meaning
TEMPLATE_MARK = re.compile(r"\{\{|\{%")

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A chat template is missing, cannot be read, or refuses the messages."""


class ChatTemplate:
    """A template ready for one tokenizer; made by :func:`load_chat_template`.

    Args:
        tokenizer: encodes the rendered text.
        source: where the template comes from, for error messages.
        text: the Jinja source, None for the built-in format.

    Raises:
        ChatTemplateError: the Jinja source has a syntax error.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, text: str | None):
        self.tokenizer = tokenizer
        self.source = source
        self.text = text
        try:
            self._compiled = None if text is None else _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"{source} has a syntax error in line {error.lineno}: {error.message}") from error

    def apply(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The token ids of a conversation, ready for the answer to be generated; the template alone decides about BOS.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt, tools, variables: for a Jinja template; the built-in format has no use for them.

        Raises:
            ChatTemplateError: the messages do not have the form the template needs, or the template fails.
        """
        _check_messages(messages)
        if self.text is None or self._compiled is None:
            return self.tokenizer.encode_segments(_mixtral_segments(self.tokenizer, messages))
        given = {"messages": messages, "tools": tools, "documents": None, **variables}
        shield = _Shield(self.tokenizer.special_tokens, self.text, given)
        names = {**self.tokenizer.special_token_names, "add_generation_prompt": add_generation_prompt}
        rendered = self._render(self._compiled, names | shield.hide(given))
        segments = self.tokenizer.split_special(rendered)
        return self.tokenizer.encode_segments(s if isinstance(s, int) else shield.restore(s) for s in segments)

    def _render(self, compiled: jinja2.Template, variables: Mapping[str, Any]) -> str:
        try:
            return compiled.render(variables)
        except _RefusalError as error:
            raise ChatTemplateError(f"{self.source} refuses the messages: {error.message}") from None
        except jinja2.sandbox.SecurityError as error:
            raise ChatTemplateError(f"{self.source} does what the sandbox forbids: {error}") from error
        except Exception as error:  # a template can raise anything Python can
            raise ChatTemplateError(f"{self.source} fails: {type(error).__name__}: {error}") from error


def load_chat_template(tokenizer: Tokenizer, chat_template: str | None = None) -> ChatTemplate:
    """The chat template the user chose, else the one beside the tokenizer.

    Args:
        tokenizer: its folder is searched: chat_template.jinja, then chat_template.json, then tokenizer_config.json.
        chat_template: "mixtral" (the built-in format), a file, or a Jinja template itself.

    Raises:
        ChatTemplateError: there is no such template, or it has a syntax error.
    """
    if chat_template is None:
        return ChatTemplate(tokenizer, *_template_beside(tokenizer))
    if chat_template == BUILT_IN:
        _check_built_in(tokenizer)
        return ChatTemplate(tokenizer, f"the built-in {BUILT_IN} template", None)
    if TEMPLATE_MARK.search(chat_template):
        return ChatTemplate(tokenizer, "the given chat template", chat_template)
    file = Path(chat_template).expanduser()
    if file.is_file():
        return ChatTemplate(tokenizer, str(file), _read_template(file))
    raise ChatTemplateError(
        f"chat template {chat_template!r} is neither {BUILT_IN!r}, nor a file, nor a Jinja template "
        "(there is no {{ or {% in it)"
    )


def apply_chat_template(
    tokenizer: Tokenizer, messages: Sequence[Message], chat_template: str | None = None, **variables: Any
) -> list[int]:
    """:func:`load_chat_template` and :meth:`ChatTemplate.apply` in one, for a single conversation."""
    return load_chat_template(tokenizer, chat_template).apply(messages, **variables)


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"{file} cannot be read as a chat template ({error}); needs UTF-8 text") from error


def _template_beside(tokenizer: Tokenizer) -> tuple[str, str]:
    """(source, text) of the checkpoint's own template."""
    file = tokenizer.folder / "chat_template.jinja"
    if file.is_file():
        return str(file), _read_template(file)
    # PaddleNLP's own chat_template.json has other keys and no Jinja program; it is passed over.
    for file in (tokenizer.folder / "chat_template.json", tokenizer.folder / "tokenizer_config.json"):
        template = read_json(file).get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            if "default" not in named:
                raise ChatTemplateError(f"{file} has the chat templates {sorted(named)}, needs one called 'default'")
            template = named["default"]
        if template is not None:
            return f"the chat template of {file}", template
    raise ChatTemplateError(
        f"{tokenizer.folder} has no chat template (looked for chat_template.jinja, and chat_template in "
        f"chat_template.json and tokenizer_config.json): give --chat_template {BUILT_IN}, a file, or a Jinja template"
    )


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ChatTemplateError("messages is empty, needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"messages[{index}] is {message!r}, needs an object with a string 'role'")


# The built-in format: Mixtral-8x7B-Instruct-v0.1.


def _check_built_in(tokenizer: Tokenizer) -> None:
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ChatTemplateError(
            f"the {BUILT_IN} template needs a tokenizer with BOS and EOS, {tokenizer.folder} lacks one"
        )
    if "[INST]" in tokenizer.special_tokens:
        raise ChatTemplateError(
            f"the {BUILT_IN} template writes [INST] as text, which this tokenizer has as a special token: "
            "it belongs to a newer model; use the template of its own checkpoint"
        )


def _mixtral_segments(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[str | int]:
    """BOS, then "[INST] user [/INST]" for every turn, with " answer" and EOS after all but the last.

    A system message is put before the first user message, with an empty line between.

    Source: the model card of mistralai/Mixtral-8x7B-Instruct-v0.1, section "Instruction format".
    """
    system = messages[0]["role"] == "system"
    _check_turns(messages, first=int(system))
    contents = [message["content"] for message in messages]
    if system:
        contents[:2] = ["\n\n".join(contents[:2])]
    segments: list[str | int] = [tokenizer.bos_token_id]  # type: ignore[list-item]  # _check_built_in
    for user, answer in zip(contents[::2], contents[1::2], strict=False):
        segments += [f"[INST] {user} [/INST] {answer}", tokenizer.eos_token_id]  # type: ignore[list-item]
    return [*segments, f"[INST] {contents[-1]} [/INST]"]


def _check_turns(messages: Sequence[Message], first: int) -> None:
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if not isinstance(content, str) or not content:
            raise ChatTemplateError(f"messages[{index}] has the content {content!r}, needs a non-empty string")
        if role not in ("system", "user", "assistant"):
            raise ChatTemplateError(
                f"messages[{index}] has the role {role!r}, needs 'user' or 'assistant' (or 'system' for the first)"
            )
        needed = "user" if (index - first) % 2 == 0 else "assistant"
        if index >= first and role != needed:
            raise ChatTemplateError(
                f"messages[{index}] has the role {role!r}, needs {needed!r}: after an optional system message, "
                "user and assistant alternate, beginning with user"
            )
    if messages[-1]["role"] != "user":
        index = len(messages) - 1
        raise ChatTemplateError(f"messages[{index}], the last, has the role {messages[-1]['role']!r}, needs 'user'")


# Rendering Jinja templates as transformers does.


class _RefusalError(jinja2.TemplateError):
    """raise_exception of a template."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks answers for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The sandbox chat templates are written for: whitespace rules, filters and functions of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusalError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Shield:
    """Keeps the special literals in what was given from being read as special tokens; see the top of this file."""

    def __init__(self, literals: Mapping[str, int], template: str, given: Any):
        seen = set(template).union(*literals, json.dumps(given, ensure_ascii=False, default=str))
        unused = (chr(code) for code in range(PRIVATE_USE, PRIVATE_USE + 0xFFFE) if chr(code) not in seen)
        self._stand_ins = {first: next(unused) for first in sorted({literal[0] for literal in literals})}
        self._restored = str.maketrans({stand_in: first for first, stand_in in self._stand_ins.items()})
        # A lookahead, so that literals which overlap are all found.
        self._literal = re.compile(f"(?={'|'.join(map(re.escape, literals)) or '(?!)'}).", re.DOTALL)

    def hide(self, given: Any) -> Any:
        """``given`` with the first character of each special literal replaced by its stand-in."""
        return _map_strings(given, lambda text: self._literal.sub(lambda match: self._stand_ins[match.group()], text))

    def restore(self, text: str) -> str:
        return text.translate(self._restored)


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """``value`` with ``function`` applied to every string in it, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, function): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, function) for item in value]
    return value
