"""ops.sampling against the reference, token for token, and against the distributions it promises."""

import hashlib

import numpy as np
import paddle
import pytest

from ops import reference
from ops.library import num_threads, set_num_threads
from ops.sampling import FLOAT_COLUMNS, INT_COLUMNS, MAX_TOP_LOGPROBS, sample
from tests.ops import sampling_rows
from tests.ops.instruction_sets import digests
from tests.ops.sizes import SAMPLE

# The float32 exponentials are within 2 units in the last place, their float64 sum and its logarithm far closer; the
# result is one rounding of a number up to about 20.
LOGPROB_TOLERANCE = 3e-6


class Rows(sampling_rows.Rows):
    """Rows that the operator samples from."""

    def sample(self) -> list[np.ndarray]:
        """next_tokens, logprobs, top_ids and top_logprobs."""
        outputs = sample(*map(paddle.to_tensor, self.arrays()))
        assert [x.dtype for x in outputs] == [paddle.int32, paddle.float32] * 2
        return [x.numpy() for x in outputs]


def test_the_columns_are_those_of_the_rows():
    assert tuple(sampling_rows.FLOAT_DEFAULTS) == tuple(FLOAT_COLUMNS)
    assert tuple(sampling_rows.INT_DEFAULTS) == tuple(INT_COLUMNS)


def tokens_of(logits, *parameters: dict, histories=None, biases=None) -> list[int]:
    """The tokens of rows with the same logits."""
    return Rows([logits] * len(parameters), list(parameters), histories, biases).sample()[0].tolist()


@pytest.mark.parametrize(("count", "vocabulary"), SAMPLE)
def test_sample_is_the_reference(count, vocabulary):
    rows = Rows.random(count, vocabulary, seed=vocabulary)
    tokens, logprobs, top_ids, top_logprobs = rows.sample()
    expected_tokens, expected_logprobs, expected_top_ids, expected_top_logprobs = reference.sample(*rows.arrays())
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=LOGPROB_TOLERANCE)
    np.testing.assert_array_equal(top_ids, expected_top_ids)
    np.testing.assert_allclose(top_logprobs, expected_top_logprobs, rtol=0, atol=LOGPROB_TOLERANCE)


def test_philox_has_its_published_answers():
    ones = 2**32 - 1
    assert reference.philox4x32_10((0, 0), (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox4x32_10((ones, ones), (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert reference.philox4x32_10(pi[1], pi[0]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_the_operator_draws_with_philox():
    # Over 2^16 equal logits the token is the top 16 bits of the second word; seed and position each have two words.
    logits = np.zeros(2**16, np.float32)
    for seed, position in [(0, 0), (-1, 3), (2**33 + 5, 2**34 + 7), (-(2**63), 2**63 - 1)]:
        words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, position & 0xFFFFFFFF, position >> 32]
        second = reference.philox4x32_10((words[0], words[1]), (words[2], words[3], 0, 0))[1]
        assert tokens_of(logits, {"temperature": 1.0, "seed": seed, "position": position}) == [second >> 16]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, np.array([16, 9, 2.25, 1, 0.25]) / 28.5),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.8}, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.3}, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        # top_p counts within the three that top_k left: 0.8 of 0.85 is reached by two.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_are_the_probabilities(parameters, expected, vary):
    draws = 4000
    order = [3, 1, 4, 0, 2]  # so that the tokens are not in decreasing probability
    logits = np.log([0.4, 0.3, 0.15, 0.1, 0.05])[order]
    tokens = tokens_of(logits, *({**parameters, vary: i} for i in range(draws)))
    counts = np.bincount(tokens, minlength=5)
    expected = np.asarray(expected)[order] * draws
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 0.1 % of such sums with 4 degrees of freedom are larger; seeds are fixed


def test_greedy_takes_the_first_of_equals():
    assert tokens_of([1, 5, 2, 5, 5], {}) == [1]
    assert tokens_of([-np.inf, -np.inf, -1e30], {}) == [2]
    long = np.zeros(1000)
    long[[700, 900]] = 1
    assert tokens_of(long, {}) == [700]


def test_ties_at_the_cuts():
    draws = [{"temperature": 1.0, "seed": i} for i in range(200)]
    equal = [1.0, 2.0, 2.0, 2.0, 0.0]
    # Every token equal to the k-th stays; of equals, top_p takes the first.
    assert set(tokens_of(equal, *({**d, "top_k": 2} for d in draws))) == {1, 2, 3}
    assert set(tokens_of(np.zeros(4), *({**d, "top_p": 0.5} for d in draws))) == {0, 1}
    assert set(tokens_of([0.0, -0.0, 0.0, -0.0], *({**d, "top_k": 1} for d in draws))) == {0, 1, 2, 3}
    assert set(tokens_of(equal, *({**d, "min_p": 1.0} for d in draws))) == {1, 2, 3}


def test_penalties_by_hand():
    logits, history = [4.0, -1.0, 3.9, 0.0], [0, 1, 0, 2, 2]
    greedy = lambda **p: tokens_of(logits, {"prompt_len": 1, **p}, histories=[history])[0]  # noqa: E731
    assert greedy() == 0
    assert greedy(repetition_penalty=2.0) == 0  # 2.0, -2.0, 1.95, 0.0
    assert greedy(frequency_penalty=0.2) == 0  # the prompt's 0 does not count: 3.8 against 3.5
    assert greedy(frequency_penalty=0.2, prompt_len=0) == 0  # 3.6 against 3.5
    assert greedy(frequency_penalty=0.2, prompt_len=3) == 0  # 4.0
    assert greedy(presence_penalty=5.0) == 3  # all but 3 were generated
    assert greedy(presence_penalty=5.0, prompt_len=4) == 0  # only 2 was
    assert greedy(repetition_penalty=0.1) == 0
    assert greedy(presence_penalty=-5.0, prompt_len=4) == 2


def test_penalties_need_a_history():
    penalties = {"repetition_penalty": 5.0, "presence_penalty": 9.0, "frequency_penalty": 9.0}
    assert tokens_of([1.0, 0.9], penalties, penalties, histories=[[], [0]]) == [0, 1]


def test_extreme_parameters_still_give_a_token():
    logits, history = [3e38, -3e38, 1.0, -np.inf], [0, 0, 1, 3]
    extremes = [
        {"temperature": 1e-45},
        {"temperature": 3e38, "seed": 3},
        {"repetition_penalty": 1e-30, "temperature": 1.0},
        {"repetition_penalty": 1e30, "temperature": 1.0},
        {"presence_penalty": -3e38, "frequency_penalty": -3e38, "temperature": 0.5},
        {"presence_penalty": 3e38, "frequency_penalty": 3e38},
    ]
    tokens, logprobs, *_ = Rows([logits] * 6, extremes, [history] * 6).sample()
    assert tokens[[0, 2, 4]].tolist() == [0, 0, 0]
    assert tokens[1] in (0, 1, 2)
    assert (tokens != 3).all()
    assert not np.isnan(logprobs).any()


def test_logprob_is_of_the_logits_as_given():
    logits = [1.0, 3.0, 2.0, -np.inf]
    exact = np.array(logits) - np.log(np.exp(logits).sum())
    forced = [{"forced_token": t, "temperature": 0.1, "top_k": 1} for t in range(4)]
    tokens, logprobs, *_ = Rows([logits] * 4, forced, [[1]] * 4).sample()
    assert tokens.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(logprobs, exact, rtol=0, atol=1e-6)


def test_neighbours_and_threads_do_not_change_a_bit():
    rows = Rows.random(60, 300, seed=3)
    before = num_threads()
    try:
        set_num_threads(3)
        together = rows.sample()
        set_num_threads(1)
        for s in range(60):
            for alone, batched in zip(rows.row(s).sample(), together, strict=True):
                np.testing.assert_array_equal(alone[0], batched[s])
    finally:
        set_num_threads(before)


def digest() -> str:
    """SHA-256 of all that sampling gives: compared between instruction sets."""
    results = [Rows.random(50, vocabulary, seed=8).sample() for vocabulary in (5, 1001)]
    return hashlib.sha256(b"".join(x.tobytes() for outputs in results for x in outputs)).hexdigest()


def test_instruction_sets_agree():
    found = digests("test_sampling")
    assert set(found.values()) == {digest()}, found


def test_no_rows_give_no_tokens():
    rows = Rows(np.zeros((0, 9)), [])
    rows.floats, rows.ints = np.zeros((0, 6), np.float32), np.zeros((0, 6), np.int64)
    assert [x.shape for x in rows.sample()] == [(0,), (0,), (0, MAX_TOP_LOGPROBS), (0, MAX_TOP_LOGPROBS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.5}, "row 1: temperature is -0.5, needs a finite number, 0 or more"),
        ({"temperature": np.nan}, "row 1: temperature is nan"),
        ({"top_p": 0.0}, "row 1: top_p is 0, needs a number above 0, at most 1"),
        ({"top_p": 1.5}, "row 1: top_p is 1.5"),
        ({"min_p": -0.1}, r"row 1: min_p is -0.1, needs a number from 0 \(off\) to 1"),
        ({"repetition_penalty": 0.0}, "row 1: repetition_penalty is 0, needs a finite number above 0"),
        ({"presence_penalty": np.inf}, "row 1: presence_penalty is inf, needs a finite number"),
        ({"frequency_penalty": np.nan}, "row 1: frequency_penalty is nan, needs a finite number"),
        ({"top_k": -1}, r"row 1: top_k is -1, needs 0 \(off\) or more"),
        ({"forced_token": 4}, "row 1: forced_token is 4, needs a token below 4, or -1 for none"),
        ({"top_logprobs": 21}, r"row 1: top_logprobs is 21, needs 0 \(none\) to 20"),
        ({"prompt_len": 3}, "row 1: prompt_len is 3, needs 0 to 2, the length of its history"),
    ],
)
def test_parameters_are_refused_by_row_and_name(change, message):
    with pytest.raises(ValueError, match=message):
        Rows(np.zeros((2, 4)), [{}, change], [[], [0, 3]]).sample()


@pytest.mark.parametrize("bad", [[0, np.nan, 0], [np.inf, 0, 0], [-np.inf] * 3, [0, 0, -np.nan]])
@pytest.mark.parametrize("parameters", [{}, {"forced_token": 0}, {"temperature": 1.0}])
def test_logits_without_a_distribution_are_refused(bad, parameters):
    with pytest.raises(ValueError, match=r"row 1 of logits holds NaN or \+inf, or nothing but -inf"):
        Rows([[0, 1, 2], bad], [{}, parameters]).sample()


def test_a_bias_that_masks_every_token_is_refused():
    with pytest.raises(ValueError, match=r"row 1 of logits holds .* nothing but -inf \(its bias added\)"):
        Rows([[0, 1], [0, 1]], [{}, {}], biases=[{}, {0: -np.inf, 1: -np.inf}]).sample()


def test_biases_by_hand():
    logits = [4.0, 3.0, -np.inf]
    biases = [{}, {1: 1.5}, {0: -np.inf}, {2: 100.0}, {1: 3.4e38}]
    tokens, logprobs, *_ = Rows([logits] * 5, [{}] * 5, biases=biases).sample()
    assert tokens.tolist() == [0, 1, 1, 0, 1]
    exact = np.array(logits) - np.log(np.exp(logits).sum())  # a bias does not change what the model thinks
    np.testing.assert_allclose(logprobs, exact[tokens], rtol=0, atol=1e-6)
    # It comes before the penalties: 4 + 3 and 3 + 3.5, halved or not.
    penalised = {"repetition_penalty": 2.0}
    assert tokens_of(logits, penalised, histories=[[0]], biases=[{0: 3.0, 1: 0.6}]) == [1]
    # A token may come twice: both count.
    twice = Rows([logits], [{}], biases=[{1: 0.6}])
    twice.bias_ids, twice.bias_values = np.array([1, 1], np.int32), np.array([0.6, 0.6], np.float32)
    twice.bias_offsets = np.array([0, 2], np.int32)
    assert twice.sample()[0].tolist() == [1]


def test_the_most_probable_tokens():
    logits = np.full(200, -50.0)
    logits[[150, 3, 77, 199]] = [5.0, 4.0, 5.0, 1.0]
    wanted = [{"top_logprobs": k, "temperature": 1.0, "top_k": 1} for k in (0, 1, 3, 20)]
    tokens, logprobs, top_ids, top_logprobs = Rows([logits] * 4, wanted, biases=[{}, {}, {}, {3: 9.0}]).sample()
    assert (top_ids >= 0).sum(axis=1).tolist() == [0, 1, 3, 20]
    assert top_ids[3, :5].tolist() == [77, 150, 3, 199, 0]
    assert top_ids[2, :3].tolist() == [77, 150, 3]
    assert (top_logprobs[top_ids < 0] == 0).all()
    assert tokens[3] == 3
    assert logprobs[3] == top_logprobs[3, 2]  # the same bits: the same distribution
    # Masked tokens are no alternatives.
    _, _, few, _ = Rows([[-np.inf, 2.0, -np.inf]], [{"top_logprobs": 3}]).sample()
    assert few[0, :3].tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("floats", np.zeros((2, 5), np.float32), r"floats has shape \[2, 5\], needs \[2, 6\]"),
        ("ints", np.zeros((2, 5), np.int32), "ints is int32, needs int64"),
        ("history_offsets", np.array([0, 1], np.int32), r"history_offsets has shape \[2\], needs \[3\]"),
        ("history_offsets", np.array([1, 1, 2], np.int32), r"history_offsets\[0\] is 1, needs 0"),
        (
            "history_offsets",
            np.array([0, 2, 1], np.int32),
            r"history_offsets\[2\] is 1, needs history_offsets\[1\] = 2",
        ),
        ("history_offsets", np.array([0, 1, 3], np.int32), r"history_offsets\[2\] is 3, needs .* to 2, the size of"),
        ("history_ids", np.array([0, 4], np.int32), r"row 1: history_ids\[1\] is 4, needs a token, 0 to 3"),
        ("history_ids", np.array([-1, 0], np.int32), r"row 0: history_ids\[0\] is -1"),
        ("bias_offsets", np.array([0, 2, 1], np.int32), r"bias_offsets\[2\] is 1, needs bias_offsets\[1\] = 2"),
        ("bias_ids", np.array([0, 4], np.int32), r"row 1: bias_ids\[1\] is 4, needs a token, 0 to 3"),
        ("bias_values", np.zeros(1, np.float32), r"bias_values has shape \[1\], needs \[2\]"),
        ("bias_values", np.array([0, np.inf], np.float32), r"bias_values\[1\] is inf, needs a finite number, or -inf"),
        ("bias_values", np.array([0, np.nan], np.float32), r"bias_values\[1\] is nan"),
    ],
)
def test_wrong_arrays_are_refused_by_name(name, value, message):
    rows = Rows(np.zeros((2, 4)), [{}, {}], [[1], [2]], [{0: 1.0}, {3: 2.0}])
    setattr(rows, name, value)
    with pytest.raises(ValueError, match=message):
        rows.sample()
