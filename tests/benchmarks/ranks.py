"""Several ranks on one machine against one rank with all of its threads, in turns within one job.

    python -m paddle.distributed.launch --nproc_per_node 2 tests/benchmarks/ranks.py ONE SEVERAL

ONE is an export for a single rank, SEVERAL one of the same model for as many ranks as the launcher starts; the README
says how they are made. All ranks run SEVERAL, then rank 0 alone runs ONE with all processors while the others wait,
and so on: a turn is a prompt of 512 tokens and eight decode steps, each measured as `paddle-mixtral bench` does.
"""

import argparse
import sys
from functools import cached_property
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from predict import startup

    startup.begin()  # before Paddle is imported

import numpy as np

from ops import library
from predict.arguments import count
from predict.bench.measure import Bench
from predict.bench.plan import Decode, Options, make_plan
from predict.llm import LLM
from predict.parallel import Ranks, alone, barrier, run
from tests.benchmarks.markdown import markdown_table

PROMPT_LEN, CONTEXT_LEN, STEPS = 512, 5, 8


class Side:
    """A model on this process's share of some ranks."""

    def __init__(self, model: str, ranks: Ranks):
        lengths = Options(
            *(model, "static"),
            prompt_len=(PROMPT_LEN,),
            batch_size=(1,),
            context_len=(CONTEXT_LEN,),
            gen_len=STEPS,
            repeat=1,
        )
        self.plan, self.ranks = make_plan(lengths, ranks.world_size), ranks
        cache = self.plan.cache_bytes // ranks.world_size
        self.llm = LLM(model, mode="static", kv_cache_memory=cache, total_max_length=self.plan.longest, ranks=ranks)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.plan, self.llm.runner, self.ranks, lambda steps: None)

    def turn(self) -> dict[str, float]:
        """Seconds of a decode step (median) and of the prompt."""
        library.set_num_threads(self.ranks.local_threads)
        samples = self.bench.run()
        steps = [sample.seconds for sample in samples[Decode(1, CONTEXT_LEN)]]
        return {
            f"decode, context {CONTEXT_LEN}": float(np.median(steps)),
            f"prefill {PROMPT_LEN}": samples[PROMPT_LEN][0].seconds,
        }


def compare(one: str, several: str, turns: int, ranks: Ranks) -> None:
    """Measures both in turns; rank 0 prints."""
    if ranks.world_size == 1:
        raise ValueError("there is one rank; start it with python -m paddle.distributed.launch --nproc_per_node 2")
    # Every rank opens both: they settle the size of the cache together, and ONE is mapped, so it is there once.
    together, by_itself = Side(several, ranks), Side(one, alone())
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(turns):
        both = together.turn()
        if ranks.rank == 0:
            found.append((both, by_itself.turn()))
        barrier()
    if ranks.rank != 0:
        return
    threads = by_itself.ranks.local_threads
    rows = [["", f"{ranks.world_size} ranks, ms", f"1 rank of {threads} threads, ms", "ratio p10", "p50", "p90"]]
    for name in found[0][0]:
        seconds = np.array([[ours[name], its[name]] for ours, its in found])
        ratios = np.percentile(seconds[:, 0] / seconds[:, 1], [10, 50, 90])
        medians = np.median(seconds, axis=0)
        rows.append([name, *(f"{1e3 * s:.2f}" for s in medians), *(f"{ratio:.3f}" for ratio in ratios)])
    print(markdown_table(rows), flush=True)


def main() -> int:
    """Exit status of this rank."""
    p = argparse.ArgumentParser("ranks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("one", metavar="ONE")
    p.add_argument("several", metavar="SEVERAL")
    p.add_argument("--turns", type=count, default=10, metavar="N", help="default: 10")
    args = p.parse_args()
    return run(lambda ranks: compare(args.one, args.several, args.turns, ranks))


if __name__ == "__main__":
    sys.exit(main())
