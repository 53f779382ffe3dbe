"""The sizes every implementation of an operator is tested at: the CPU's, the emulated GPU's and the GPU's."""

from dataclasses import dataclass

# (T, N, K): K around the 16 lanes of a vector and the columns of tiles (32, 64); T around the panels (6, 12 tokens) and
# tasks (48) of the CPU.
LINEAR = [
    (1, 1, 1),
    (1, 33, 16),
    (2, 17, 15),
    (3, 5, 100),
    (6, 64, 512),
    (7, 31, 513),
    (13, 70, 1100),
    (11, 33, 66),
    (12, 32, 64),
    (97, 40, 48),
]

# (T, H, I, E): E not a power of two, H and I not multiples of 16, more tokens than a panel (6) and a task (48) hold.
FUSED_MOE = [(1, 16, 16, 1), (1, 77, 33, 5), (2, 64, 48, 3), (9, 40, 530, 8), (30, 531, 70, 3), (130, 35, 50, 17)]

# (T, H)
RMS_NORM = [(1, 1), (1, 15), (3, 16), (5, 77), (2, 4096), (33, 130)]


@dataclass(frozen=True)
class Heads:
    """Hq, Hkv, D, rope_theta and window of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e4
    window: int = 0

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def arguments(self) -> tuple:
        """As the operator and its reference take them."""
        return self.num_heads, self.num_kv_heads, self.rope_theta, self.window


# (Hq, Hkv, D, block_size); a GPU refuses D above 128 or not a multiple of 8.
ATTENTION = [
    (4, 1, 2, 8),
    (6, 6, 24, 16),
    (8, 2, 80, 16),
    (12, 2, 96, 32),
    (8, 2, 128, 64),
    (9, 1, 256, 128),
    (5, 1, 34, 5),
]
WINDOWS = [0, 1, 7, 33]

# (S, V)
SAMPLE = [(40, 1), (200, 2), (300, 17), (300, 100), (100, 1000), (20, 32000)]
