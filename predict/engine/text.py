"""The text of a sequence as its tokens come: only what is certain is shown, and nothing of a stop string."""

from collections.abc import Callable, Iterable
from typing import Protocol


class Detokenizer(Protocol):
    """Text from tokens; predict.model.tokenizer.IncrementalDetokenizer is one."""

    def push(self, token_id: int) -> str:
        """The text that became certain with a token; never half a character."""
        ...

    def finish(self) -> str:
        """What is left at the end."""
        ...


class StopStrings:
    """Watches a text for stop strings, however it is cut into pieces.

    The string that is complete first ends the text; of those complete at the same character, the longest. Each is
    followed by Knuth, Morris and Pratt's algorithm (doi:10.1137/0206024), a character at a time.
    """

    def __init__(self, stop: Iterable[str]):
        self._stop = [(text, _borders(text)) for text in stop]
        self._first = {text[0] for text, _ in self._stop}
        self._matched = [0] * len(self._stop)  # characters of each that the text now ends with
        self._held = ""  # what may be part of one
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What can be shown of the text so far; "" once a stop string is found."""
        if not self._held and self.found is None and self._first.isdisjoint(text):
            return text  # nothing has begun, and nothing begins
        if self.found is not None:
            return ""
        unshown = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [stop for i, (stop, _) in enumerate(self._stop) if self._advance(i, character)]
            if complete:
                self.found, self._held = max(complete, key=len), ""
                return unshown[: end - len(self.found)]
        shown = len(unshown) - max(self._matched, default=0)
        self._held = unshown[shown:]
        return unshown[:shown]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        left, self._held = self._held, ""
        return left

    def _advance(self, i: int, character: str) -> bool:
        stop, borders = self._stop[i]
        matched = self._matched[i]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        matched += stop[matched] == character
        self._matched[i] = matched
        return matched == len(stop)


class StoppedText:
    """A sequence's text: its tokens' text up to a stop string.

    Args:
        new_detokenizer: makes the detokenizer, when the first token comes.
        stop: the stop strings.
        min_tokens: tokens whose text is not searched.
    """

    def __init__(self, new_detokenizer: Callable[[], Detokenizer], stop: tuple[str, ...], min_tokens: int):
        self._new_detokenizer = new_detokenizer
        self._detokenizer: Detokenizer | None = None
        self._stop_strings = StopStrings(stop)
        self._unsearched = min_tokens if stop else 0

    @property
    def found(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stop_strings.found

    def push(self, token_id: int) -> str:
        """The text that can be shown now that ``token_id`` has come."""
        if self._detokenizer is None:
            self._detokenizer = self._new_detokenizer()
        text = self._detokenizer.push(token_id)
        if self._unsearched:
            self._unsearched -= 1
            return text
        return self._stop_strings.push(text)

    def finish(self) -> str:
        """What is left to show at the end."""
        left = self._detokenizer.finish() if self._detokenizer is not None else ""
        return self._stop_strings.push(left) + self._stop_strings.finish()


def _borders(text: str) -> list[int]:
    """For each prefix of ``text``, the length of the longest shorter one that it also ends with."""
    borders = [0] * len(text)
    for i in range(1, len(text)):
        length = borders[i - 1]
        while length and text[i] != text[length]:
            length = borders[length - 1]
        borders[i] = length + (text[i] == text[length])
    return borders
