"""What holds of an engine between any two steps, as one function over a snapshot of it.

It stands among the tests because only they call it; it reads what nothing else should.
"""

from collections import Counter

from predict.engine.engine import Engine


def check_invariants(engine: Engine) -> None:
    """Asserts that no page and no sequence is lost, doubled or in two places."""
    manager, scheduler = engine.block_manager, engine.scheduler
    size = manager.block_size

    # Every page is held exactly as often as counted, or cached, or free, and never two of these.
    held = Counter(block for s in scheduler.running for block in s.block_ids)
    assert all(manager._references[block] == count for block, count in held.items())
    assert sum(map(bool, manager._references)) == len(held)
    others = [*manager._free, *manager._cached]
    assert len(held) + len(others) == manager.num_blocks
    assert held.keys().isdisjoint(others)
    assert len(set(others)) == len(others)

    # The tree knows pages by one key each, and the predecessor of each; what is cached is known.
    assert all(manager._keys[block] == key for key, block in manager._known.items())
    assert sum(key is not None for key in manager._keys) == len(manager._known)
    assert all(manager._keys[block] is not None for block in manager._cached)
    for parent, _ in manager._known:
        assert not isinstance(parent, int) or parent < 0 or manager._keys[parent] is not None

    # Every unfinished sequence runs or waits, once, and in the order they came.
    sequences = [*scheduler.running, *scheduler.waiting]
    unfinished = [s for request in engine._unfinished.values() for s in request]
    assert sequences == unfinished
    assert len(scheduler.running) <= scheduler.max_num_seqs

    for s in scheduler.running:
        tokens, computed = len(s.token_ids), s.num_computed
        assert s.prompt_len <= tokens < s.max_length
        assert computed < tokens
        assert computed <= size * len(s.block_ids)
        assert s.num_registered == computed // size
        # Only the youngest may be in mid-prompt.
        assert tokens - computed == 1 or s is scheduler.running[-1]
    for s in scheduler.waiting:
        assert not s.block_ids
        assert s.num_computed == s.num_registered == 0
