"""How many pages of KV cache there are: what was asked for, or what this machine's free memory allows."""

from pathlib import Path

# Of the memory that is free when the weights are loaded; the rest is the kernels' workspace, and other programs'.
DEFAULT_SHARE = 0.5
# Control group files: limit, usage, and the statistic of what the usage counts but gives back when asked.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_memory() -> int:
    """Bytes this process and others can still take: the machine's, or its control group's where that is less."""
    free = [_statistic("/proc/meminfo", "MemAvailable:") * 1024]
    for limit, usage, statistics, reclaimable in _CGROUPS:
        try:
            free.append(
                int(Path(limit).read_text()) - int(Path(usage).read_text()) + _statistic(statistics, reclaimable)
            )
        except (OSError, ValueError):  # another version of control groups, or "max": no limit
            continue
    return max(0, min(free))


def cache_blocks(
    kv_cache_memory: int | None, free: int, block_size: int, bytes_per_token: int, max_num_seqs: int, max_length: int
) -> int:
    """Pages of one rank's KV cache.

    Args:
        kv_cache_memory: bytes the cache may take; None is half of what is free, or less where max_num_seqs sequences of
            max_length tokens cannot use it.
        free: bytes of memory that are free for this rank.
        block_size: tokens in a page.
        bytes_per_token: bytes of a token on one rank.
        max_num_seqs: sequences that run together.
        max_length: tokens of a sequence.

    Raises:
        MemoryError: there is room for less than a page, or more was asked for than is free; says the numbers.
    """
    page = block_size * bytes_per_token
    if kv_cache_memory is None:
        blocks = min(int(DEFAULT_SHARE * free) // page, max_num_seqs * -(-max_length // block_size))
    elif kv_cache_memory > free:
        raise MemoryError(
            f"kv_cache_memory is {kv_cache_memory / 1e9:.3f} GB, more than there is free for a rank "
            f"({free / 1e9:.3f} GB); use a smaller --kv_cache_memory, or leave it out"
        )
    else:
        blocks = kv_cache_memory // page
    if blocks < 1:
        memory = DEFAULT_SHARE * free if kv_cache_memory is None else kv_cache_memory
        raise MemoryError(
            f"{memory / 1e6:.3f} MB of KV cache hold no page: {block_size} tokens of {bytes_per_token} bytes take "
            f"{page / 1e6:.3f} MB; use a larger --kv_cache_memory, or a smaller --block_size"
        )
    return blocks


def _statistic(file: str, name: str) -> int:
    """The number after ``name`` in a file of names and numbers."""
    for line in Path(file).read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    raise ValueError(f"{file} has no {name}")
