"""Pages of the KV cache: who holds which, and which ones hold a prefix that another sequence can use.

A page is in exactly one of these states:
  held    by as many sequences as its count of references says;
  cached  by none, but its content is known and may be asked for again; the page unused longest is given out first;
  free    by none, its content forgotten.

The prefix cache is a tree. A full page is known by (the page before it, its own token ids), compared exactly, so a page
is found only by a sequence all of whose tokens up to the page's end are those it was computed from: by law 1 it holds
what computing them again would write, whatever batch or chunks it was computed in.
"""

from array import array
from collections import OrderedDict

from predict.engine.request import Sequence

ROOT = -1  # the page before the first


class BlockManager:
    """Hands out page numbers of a pool of ``num_blocks`` pages of ``block_size`` tokens.

    With ``prefix_caching`` off, pages are shared by the samples of one request only, and forgotten when nobody holds
    them.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        # Popped from the end: the lowest numbers go first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._keys: list[tuple | None] = [None] * num_blocks  # of the pages the tree knows
        self._known: dict[tuple, int] = {}
        # Unused longest first. A page is released after those that follow it, so it is also given out after them: a
        # page the tree knows always has its predecessors there.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages whose content nobody needs or knows."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages nobody holds whose content may be asked for again."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that num_tokens tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Pages to hold, of unknown content.

        Raises:
            MemoryError: fewer can be handed out than needed; says both numbers.
        """
        if num_blocks > self.num_available:
            raise MemoryError(
                f"{num_blocks} KV cache blocks of {self.block_size} tokens are needed, {self.num_available} of "
                f"{self.num_blocks} are available; use a larger --kv_cache_memory"
            )
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Known pages that hold the first tokens of a sequence, of which at least one is left to compute."""
        tokens, size, parent = sequence.token_ids, self.block_size, self._root(sequence)
        found = []
        for start in range(0, (len(tokens) - 1) // size * size, size):
            block = self._known.get((parent, tokens[start : start + size].tobytes()))
            if block is None:
                break
            found.append(block)
            parent = block
        return found

    def needed(self, sequence: Sequence, prefix: list[int]) -> int:
        """Available pages that holding a sequence's present tokens takes, if it begins with ``prefix``."""
        return self.blocks_for(len(sequence.token_ids)) - sum(self._references[block] > 0 for block in prefix)

    def hold(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives a sequence pages for its present tokens: a found prefix, shared, and new ones."""
        for block in prefix:
            self._hold(block)
        sequence.block_ids = array("i", prefix)
        sequence.block_ids.extend(self.allocate(self.blocks_for(len(sequence.token_ids)) - len(prefix)))
        sequence.num_registered = len(prefix)
        sequence.num_computed = len(prefix) * self.block_size

    def register(self, sequence: Sequence) -> None:
        """Makes the pages that a sequence has filled known to others.

        Where two sequences have computed the same page at the same time, the second gives its own back.
        """
        tokens, blocks, size = sequence.token_ids, sequence.block_ids, self.block_size
        for i in range(sequence.num_registered, sequence.num_computed // size):
            key = (blocks[i - 1] if i else self._root(sequence), tokens[i * size : (i + 1) * size].tobytes())
            known = self._known.setdefault(key, blocks[i])
            if known == blocks[i]:
                self._keys[known] = key
            else:
                self._hold(known)
                self.free([blocks[i]])
                blocks[i] = known
            sequence.num_registered = i + 1

    def release(self, sequence: Sequence) -> None:
        """Takes all pages of a sequence back."""
        self.free(sequence.block_ids)
        sequence.block_ids = array("i")
        sequence.num_computed = sequence.num_registered = 0

    def free(self, block_ids: list[int] | array) -> None:
        """Takes pages back from one who held them, in order of position."""
        for block in reversed(block_ids):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is not None and self.prefix_caching:
                self._cached[block] = None
            else:
                self._forget(block)
                self._free.append(block)

    def _root(self, sequence: Sequence) -> int | str:
        return ROOT if self.prefix_caching else sequence.request_id

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._known[key]
            self._keys[block] = None
