"""What a step must move and compute: bytes of weights and cache, operations. Of one rank."""

from dataclasses import dataclass

from predict.model.config import MixtralConfig
from predict.model.memory import ELEMENT_BYTES
from predict.model.mixtral import padded_vocab_share
from predict.runner import bytes_per_token


@dataclass(frozen=True)
class Traffic:
    """The sizes of a rank's share of a network.

    Args:
        config, dtype, quant_type: the model; the dtype is that of the KV cache and of unquantised weights.
        world_size: ranks it is split over.
    """

    config: MixtralConfig
    dtype: str
    quant_type: str | None
    world_size: int

    def step_bytes(self, experts_hit: int, visible: list[int]) -> int:
        """Bytes a step must read: every weight it uses once, and the cache of every sequence once.

        That is attention, router and lm_head, the experts that had a token, and keys and values. Left out are embedding
        rows, norms and activations, which stay in caches or are small.

        Args:
            experts_hit: experts with at least one token, summed over the layers.
            visible: for each sequence, the tokens its last token sees, itself included.
        """
        config, ranks = self.config, self.world_size
        hidden, heads = config.hidden_size, config.num_attention_heads
        query, key_value = heads * config.head_dim // ranks, config.num_key_value_heads * config.head_dim // ranks
        intermediate = config.intermediate_size // ranks
        attention = self._matrix(query + 2 * key_value, hidden) + self._matrix(hidden, query)
        router = 4 * config.num_local_experts * hidden  # float32, whole on every rank
        expert = self._matrix(2 * intermediate, hidden) + self._matrix(hidden, intermediate)
        weights = config.num_hidden_layers * (attention + router) + experts_hit * expert
        weights += self._matrix(padded_vocab_share(config, ranks), hidden)
        return weights + sum(map(self._window, visible)) * bytes_per_token(config, ranks, self.dtype)

    def step_operations(self, chunks: list[tuple[int, int]], rows: int) -> int:
        """Multiplications and additions of a step; of attention, only positions a token sees.

        Args:
            chunks: (tokens already in the cache, new tokens) of each sequence.
            rows: tokens whose successor is sampled.
        """
        config = self.config
        hidden, heads = config.hidden_size, config.num_attention_heads
        projections = (2 * heads + 2 * config.num_key_value_heads) * config.head_dim * hidden
        experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
        router = config.num_local_experts * hidden * self.world_size  # computed whole on every rank
        tokens = sum(new for _, new in chunks)
        seen = sum(self._window(context + i + 1) for context, new in chunks for i in range(new))
        attention = 2 * heads * config.head_dim * seen  # q k^T and the weighted sum of v
        layers = config.num_hidden_layers * (tokens * (projections + experts + router) + attention)
        return 2 * (layers + rows * config.vocab_size * hidden) // self.world_size

    def _matrix(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight, its scales included."""
        if self.quant_type is not None:
            return out_features * (in_features + 4)
        return out_features * in_features * ELEMENT_BYTES[self.dtype]

    def _window(self, seen: int) -> int:
        return min(seen, self.config.sliding_window or seen)
