"""A data file through the engine: rows are taken as there is room, answers come as they are done."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from predict.answers import Answer, Earlier, open_answers
from predict.completion import Collector
from predict.dataset import DataFile
from predict.engine.engine import Engine
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.progress import progress

ROWS_PER_SEQ = 2  # rows taken for each sequence that may run: should all end in one step, the next is full again


def answer_rows(
    engine: Engine,
    rows: DataFile,
    ids: Iterable[int],
    encode: Callable[[str], list[int]],
    params: SamplingParams,
    *,
    chat: bool = False,
    in_order: bool = True,
) -> Iterator[list[Answer]]:
    """Answers the rows, each exactly once; a row that cannot be answered gets its error.

    At most ROWS_PER_SEQ * max_num_seqs rows are with the engine. Every rank of a job makes the same steps.

    Args:
        engine: has no other requests.
        ids: numbers of the rows, in the order they are taken.
        encode: the prompt's tokens from a row's text; its ValueError is that row's error.
        params: of every row.
        chat: as Engine.add has it.
        in_order: hold answers back until those to all rows before them are there; else they come as they are done.

    Yields:
        After each step the answers it brought, which may be none.
    """
    waiting, room = iter(ids), ROWS_PER_SEQ * engine.scheduler.max_num_seqs
    unfinished: dict[str, tuple[int, str, Collector]] = {}
    taken: dict[int, Answer | None] = {}  # rows whose answer was not yielded yet, in the order they were taken
    while True:
        for i in islice(waiting, room - len(unfinished)):
            taken[i], src = None, None
            try:
                src = rows.row(i).src
                prompt = encode(src)
                engine.add(str(i), prompt, params, chat=chat)
            except ValueError as error:
                taken[i] = Answer(i, src, error=str(error))
            else:
                unfinished[str(i)] = (i, src, Collector(prompt, 0))
        if not taken:
            return
        for delta in engine.step():
            i, src, collector = unfinished[delta.request_id]
            collector.add(delta)
            if delta.finish_reason is not None:
                del unfinished[delta.request_id]
                taken[i] = Answer(i, src, collector.completion())
        yield _ready(taken, in_order)


def _ready(taken: dict[int, Answer | None], in_order: bool) -> list[Answer]:
    """Takes out the answers that can be given now."""
    ready: list[Answer] = []
    for answer in taken.values():
        if answer is not None:
            ready.append(answer)
        elif in_order:
            break
    for answer in ready:
        del taken[answer.id]
    return ready


def run_data_file(
    llm: LLM,
    rows: DataFile,
    encode: Callable[[str], list[int]],
    params: SamplingParams,
    *,
    chat: bool,
    in_order: bool,
    output: Path | None,
    earlier: Earlier,
) -> None:
    """Answers the rows that have no answer yet, on this rank; rank 0 writes each to ``output``, or prints it.

    Raises:
        ValueError: another run is writing the file, or no row of all could be answered.
        KeyboardInterrupt: after having said how to go on.
    """
    first = llm.ranks.rank == 0
    if first and output is not None and (earlier.ids or earlier.torn):
        torn = ", without the last line, which is torn" if earlier.torn else ""
        print(f"resuming: {len(earlier.ids)} of {len(rows)} rows are in {output}{torn}", file=sys.stderr)
    done, bad, first_error = len(earlier.ids), earlier.bad, ""
    generated, seconds = 0, 0.0
    todo = (i for i in range(len(rows)) if i not in earlier.ids)
    try:
        with (
            open_answers(output, earlier.size) if first and output is not None else nullcontext() as file,
            progress("generating", len(rows), "row", first, initial=done) as bar,
        ):
            started = time.perf_counter()
            for answers in answer_rows(llm.engine, rows, todo, encode, params, chat=chat, in_order=in_order):
                for answer in answers:
                    if answer.error is not None:
                        bad, first_error = bad + 1, first_error or f"row {answer.id}: {answer.error}"
                    if file is not None:
                        file.write(answer.line())
                        file.flush()
                    elif first:
                        _print(answer, chat)
                    done += 1
                generated, seconds = llm.engine.stats().generated_tokens, time.perf_counter() - started
                bar.set_postfix_str(_rate(generated, seconds), refresh=False)
                bar.update(len(answers))
    except KeyboardInterrupt:
        if first and output is not None:
            print(f"\nthe rows that are done are in {output}; the same command with --resume goes on", file=sys.stderr)
        raise
    if bad == len(rows):
        raise ValueError(f"none of the {bad} rows could be answered; {first_error}")
    if first:
        errors = f" {bad} of them with an error;" if bad else ""
        print(
            f"{done} rows,{errors} {generated} tokens in {seconds:.1f} s, {_rate(generated, seconds)}",
            file=sys.stderr,
        )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):.0f} tokens/s"


def _print(answer: Answer, chat: bool) -> None:
    if answer.completion is None:
        print(f"[{answer.id}] error: {answer.error}\n")
    else:
        print(f"[{answer.id}] {answer.src}{chr(10) if chat else ''}{answer.completion.text}\n")
