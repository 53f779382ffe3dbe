"""The text of a request: cut before a stop string, never shown beyond what is certain."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predict.engine.engine import Engine
from predict.engine.request import SamplingParams
from predict.engine.text import StopStrings
from tests.predict.paged_runner import PagedRunner, run

short = st.text("ab", min_size=1, max_size=4)


def first_stop(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first (of those complete together, the longest), and which."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


@settings(max_examples=1000, deadline=None)
@given(st.lists(short, min_size=1, max_size=4), st.lists(st.text("abc", max_size=3), max_size=20))
def test_a_text_is_cut_before_its_stop_string_however_it_comes(stop, pieces):
    text = "".join(pieces)
    found = first_stop(text, stop)
    expected = text if found is None else text[: found[0]]
    watch, shown = StopStrings(stop), ""
    for i, piece in enumerate(pieces):
        shown += watch.push(piece)
        assert expected.startswith(shown)
        # Nothing is held back that cannot become a stop string.
        held = "".join(pieces[: i + 1])[len(shown) :]
        assert watch.found is not None or any(s.startswith(held) for s in stop)
    assert watch.found == (None if found is None else found[1])
    assert shown + watch.finish() == expected


def test_every_short_stop_string_is_found_in_every_short_text():
    words = ["".join(letters) for n in range(1, 9) for letters in itertools.product("ab", repeat=n)]
    for stop, text in itertools.product(words[:62], words):  # up to five letters and eight
        watch = StopStrings([stop])
        shown = "".join(map(watch.push, text)) + watch.finish()
        assert (shown, watch.found is not None) == (text.partition(stop)[0], stop in text)


class Letters:
    """Token t is the letter number t of the prompt's alphabet; the letter z is half a character until the next."""

    def __init__(self, prompt_ids):
        self.alphabet = "uvwxyz" if list(prompt_ids) else "UVWXYZ"
        self.pending = ""

    def push(self, token_id):
        letter = self.alphabet[token_id % 6]
        if letter in "zZ":
            self.pending += letter
            return ""
        text, self.pending = self.pending + letter, ""
        return text

    def finish(self):
        return "?" * len(self.pending)


class Scripted(PagedRunner):
    """Draws the tokens of a script."""

    def __init__(self, script):
        super().__init__()
        self.script = script

    def draw(self, tokens, seed, masked=()):
        return self.script[len(tokens) - 1]


def texts(script: str, chat=False, **params):
    """The text of each Delta of a request whose tokens are these letters, and why it ended."""
    engine = Engine(Scripted(["uvwxyz".index(c) for c in script]), (), 100, new_detokenizer=Letters)
    engine.add("r", [0], SamplingParams(max_tokens=len(script), **params), chat=chat)
    deltas = run(engine)["r", 0]
    return [d.text for d in deltas], deltas[-1].finish_reason, deltas[-1].stop_reason


@pytest.mark.parametrize(
    ("script", "params", "shown"),
    [
        ("uvw", {}, (["u", "v", "w"], "length", None)),
        ("uvw", {"chat": True}, (["U", "V", "W"], "length", None)),
        ("uzzv", {}, (["u", "", "", "zzv"], "length", None)),
        ("uz", {}, (["u", "?"], "length", None)),
        # Held back from the first token that may begin a stop string, and shown when it did not come.
        ("uvuwx", {"stop": "uw"}, (["", "uv", "", ""], "stop", "uw")),
        ("uvu", {"stop": "uw"}, (["", "uv", "u"], "length", None)),
        ("xuvx", {"stop": ("vxx", "v")}, (["x", "u", ""], "stop", "v")),
        # The character that completes it may begin in one token and end in another.
        ("uzwx", {"stop": "zw"}, (["u", "", ""], "stop", "zw")),
        # A stop token's own text is not shown; what was certain before it is.
        ("uvx", {"stop_token_ids": (3,)}, (["u", "v", ""], "stop", 3)),
        ("uzx", {"stop_token_ids": (3,)}, (["u", "", "?"], "stop", 3)),
        ("vuvx", {"stop_token_ids": (3,), "stop": "uvw"}, (["v", "", "", "uv"], "stop", 3)),
        # Stop strings count in the text after min_tokens.
        ("uuvuvw", {"stop": "uv", "min_tokens": 2}, (["u", "u", "v", "", ""], "stop", "uv")),
    ],
)
def test_what_is_shown_with_each_token(script, params, shown):
    assert texts(script, **params) == shown
