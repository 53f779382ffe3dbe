"""Rows of logits with their sampling parameters: what ops.sampling.sample takes, given by name or at random."""

import numpy as np

FLOAT_DEFAULTS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
INT_DEFAULTS = {"seed": 0, "position": 0, "top_k": 0, "forced_token": -1, "prompt_len": 0, "top_logprobs": 0}


class Rows:
    """Rows of logits with their sampling parameters, given by name, as the operator takes them."""

    def __init__(
        self,
        logits,
        parameters: list[dict],
        histories: list[list[int]] | None = None,
        biases: list[dict[int, float]] | None = None,
    ):
        self.logits = np.asarray(logits, np.float32)
        self.floats = np.array([[{**FLOAT_DEFAULTS, **p}[n] for n in FLOAT_DEFAULTS] for p in parameters], np.float32)
        self.ints = np.array([[{**INT_DEFAULTS, **p}[n] for n in INT_DEFAULTS] for p in parameters], np.int64)
        histories = histories or [[] for _ in parameters]
        self.history_ids = np.array([token for history in histories for token in history], np.int32)
        self.history_offsets = np.cumsum([0, *map(len, histories)]).astype(np.int32)
        biases = biases or [{} for _ in parameters]
        self.bias_ids = np.array([token for bias in biases for token in bias], np.int32)
        self.bias_values = np.array([value for bias in biases for value in bias.values()], np.float32)
        self.bias_offsets = np.cumsum([0, *map(len, biases)]).astype(np.int32)

    def arrays(self):
        history = self.history_ids, self.history_offsets
        return self.logits, self.floats, self.ints, *history, self.bias_ids, self.bias_values, self.bias_offsets

    def row(self, s: int) -> "Rows":
        """Row s alone."""
        alone = type(self)(self.logits[s : s + 1], [{}])
        alone.floats, alone.ints = self.floats[s : s + 1], self.ints[s : s + 1]
        alone.history_ids = self.history_ids[slice(*self.history_offsets[s : s + 2])]
        alone.history_offsets = np.array([0, len(alone.history_ids)], np.int32)
        biases = slice(*self.bias_offsets[s : s + 2])
        alone.bias_ids, alone.bias_values = self.bias_ids[biases], self.bias_values[biases]
        alone.bias_offsets = np.array([0, len(alone.bias_ids)], np.int32)
        return alone

    @classmethod
    def random(cls, count: int, vocabulary: int, seed: int) -> "Rows":
        """Rows with every parameter on or off by chance; some logits tie, some are masked."""
        rng = np.random.default_rng(seed)
        logits = rng.standard_normal((count, vocabulary)) * rng.choice([0.5, 3.0, 10.0], (count, 1))
        logits = np.where(rng.random((count, 1)) < 0.3, np.round(logits), logits)
        masked = rng.random((count, vocabulary)) < rng.choice([0.0, 0.5], (count, 1))
        left = rng.integers(0, vocabulary, count)
        masked[np.arange(count), left] = False
        logits[masked] = -np.inf
        parameters, histories, biases = [], [], []
        for s in range(count):
            history = rng.integers(0, vocabulary, rng.choice([0, 1, 30])).tolist()
            choices = {
                "temperature": rng.choice([0.0, 0.3, 1.0, 2.5]),
                "top_p": rng.choice([1.0, 0.999, 0.9, 0.4, 1e-6]),
                "min_p": rng.choice([0.0, 0.05, 0.7]),
                "repetition_penalty": rng.choice([1.0, 1.3, 0.8]),
                "presence_penalty": rng.choice([0.0, 0.6, -0.4]),
                "frequency_penalty": rng.choice([0.0, 0.2]),
                "seed": rng.integers(-(2**63), 2**63 - 1),
                "position": rng.integers(0, 2**40),
                "top_k": rng.choice([0, 1, 3, 50, vocabulary, vocabulary + 7]),
                "forced_token": rng.choice([-1] * 9 + [vocabulary - 1]),
                "prompt_len": rng.integers(0, len(history) + 1),
                "top_logprobs": rng.choice([0, 0, 1, 5, 20]),
            }
            parameters.append(choices)
            histories.append(history)
            biased = rng.integers(0, vocabulary, rng.choice([0, 0, 1, 40])).tolist()
            values = rng.choice([-np.inf, -2.5, 0.0, 1.0, 100.0], len(biased)).tolist()
            biases.append({**dict(zip(biased, values, strict=True)), int(left[s]): 0.5} if biased else {})
        return cls(logits, parameters, histories, biases)
