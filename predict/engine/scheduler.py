"""Which sequences take part in the next step, with how many tokens."""

from collections import deque

from predict.engine.batch import Chunk
from predict.engine.block_manager import BlockManager
from predict.engine.request import Sequence


class Scheduler:
    """First come, first served: every running sequence is older than every waiting one.

    A step takes the next token of each running sequence, oldest first, then what is left of its budget for prompts: in
    chunks, so at most one running sequence, the youngest, is in mid-prompt. A sequence is admitted with pages for all
    its present tokens, when as many more stay available as the running ones may need next. A decode that finds no page
    takes those of the youngest running sequence, which goes back to the head of the queue with the tokens it has drawn
    and computes them again.

    No starvation: the oldest unfinished sequence advances in every step, by a token once its tokens are computed, by
    the whole budget before, and nobody takes its pages. So a request is done, whatever comes after it, within the sum
    over its own samples and those of all requests before it of

        ceil((prompt + max_tokens) / max_num_batched_tokens) + max_tokens    steps.

    Args:
        block_manager: the pages.
        max_num_seqs: sequences that run together at the most.
        max_num_batched_tokens: new tokens a step computes at the most.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_hit_tokens = self.prefix_queried_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that waits or runs; its pages are available at once."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.block_manager.release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, oldest sequence first; empty when there is nothing to do."""
        chunks: list[Chunk] = []
        budget, size = self.max_num_batched_tokens, self.block_manager.block_size
        while budget and len(chunks) < len(self.running):
            sequence = self.running[len(chunks)]
            count = min(len(sequence.token_ids) - sequence.num_computed, budget)
            if sequence.num_computed + count > size * len(sequence.block_ids) and not self._grow(sequence):
                break
            chunks.append(Chunk(sequence, count))
            budget -= count
        while budget and self.waiting and len(self.running) < self.max_num_seqs and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            count = min(len(sequence.token_ids) - sequence.num_computed, budget)
            chunks.append(Chunk(sequence, count))
            budget -= count
        return chunks

    def _grow(self, sequence: Sequence) -> bool:
        """One more page for a running sequence; False if it was itself the youngest, and gave up its own."""
        while self.block_manager.num_available == 0:
            youngest = self.running.pop()
            self.block_manager.release(youngest)
            self.waiting.appendleft(youngest)
            self.num_preemptions += 1
            if youngest is sequence:
                return False
        sequence.block_ids.extend(self.block_manager.allocate(1))
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Gives the oldest waiting sequence its pages, if it may run now."""
        leader = sequence.leader
        if leader is not None and leader.block_ids and leader.num_computed < leader.prompt_len:
            return False
        prefix = self.block_manager.find_prefix(sequence)
        spare = self.block_manager.num_available - self.block_manager.needed(sequence, prefix)
        if spare < len(self.running) and spare < sum(map(self._can_grow, self.running)):
            return False
        self.block_manager.hold(sequence, prefix)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            if leader is None:
                self.prefix_queried_tokens += sequence.prompt_len
                self.prefix_hit_tokens += sequence.num_computed
        return True

    def _can_grow(self, sequence: Sequence) -> bool:
        # The last token a sequence reaches is not computed.
        return len(sequence.block_ids) < self.block_manager.blocks_for(sequence.max_length - 1)
