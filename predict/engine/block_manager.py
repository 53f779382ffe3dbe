"""Pages of the KV cache: who owns which."""


class BlockManager:
    """Hands out page numbers of a pool of ``num_blocks`` pages of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Popped from the end: the lowest numbers go first.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that num_tokens tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> list[int]:
        """Pages for num_tokens tokens.

        Raises:
            MemoryError: fewer pages are free than needed; says both numbers.
        """
        needed = self.blocks_for(num_tokens)
        if needed > len(self._free):
            raise MemoryError(
                f"{num_tokens} tokens need {needed} KV cache blocks of {self.block_size}, {len(self._free)} of "
                f"{self.num_blocks} are free; use a smaller --batch_size or --total_max_length"
            )
        return [self._free.pop() for _ in range(needed)]

    def free(self, block_ids: list[int]) -> None:
        """Takes pages back."""
        self._free.extend(reversed(block_ids))
