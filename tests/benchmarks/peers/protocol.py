"""What is asked of a peer and what it answers: one JSON file each way, read and written by both sides.

Standard library only: every peer's own environment imports this file.
"""

import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# A case is repeated until it has taken this long, so that quick ones are not one lucky or unlucky shot.
ENOUGH_S = 3.0
MAX_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One measurement: ``batch`` sequences of ``context`` random tokens, then ``new_tokens`` for each of them.

    With one new token the prompts are what is measured (prefill), else all that follows them (decode).
    """

    batch: int
    context: int
    new_tokens: int

    @property
    def name(self) -> str:
        if self.new_tokens == 1:
            return f"prefill {self.batch * self.context}"
        return f"decode b{self.batch} p{self.context}"


@dataclass(frozen=True)
class Request:
    """What one process of a peer does.

    Attributes:
        model: the file or folder it loads.
        weight_format: "bf16", "int8", "Q8_0", "Q4_K_M": what ``model`` holds, or is to be made of it.
        seed: of the token ids.
    """

    model: str
    weight_format: str
    vocab_size: int
    threads: int
    seed: int
    cases: tuple[Case, ...]

    @staticmethod
    def read(path: str) -> "Request":
        raw = json.loads(Path(path).read_text())
        return Request(**{**raw, "cases": tuple(Case(**case) for case in raw["cases"])})


@dataclass
class Answer:
    """What it measured.

    Attributes:
        rates: tokens per second of each repetition, by the case's name.
        failed: why a case has no rate, by its name.
        load_s: from the call that loads to the engine being ready; imports and warm-up are not in it.
        peak_bytes: most memory resident at once (VmHWM), mapped files included.
        versions: of the packages that did the work.
    """

    rates: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    load_s: float = 0.0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Answer":
        return Answer(**json.loads(path.read_text()))


def write(path: str | Path, message: Request | Answer) -> None:
    """Writes the message whole or not at all."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(message), indent=1))
    partial.replace(path)


# (prompts, new tokens for each, random numbers) -> after every step, how many tokens that step gave. An engine that
# can be told its next tokens draws them from the random numbers; one that cannot samples at temperature 1, which is
# about uniform with random weights. Either way the router sees tokens that differ.
Engine = Callable[[list[list[int]], int, random.Random], Iterator[int]]


def serve(load: Callable[[Request], Engine], versions: Callable[[], dict[str, str]]) -> None:
    """A runner's main: ``python -m RUNNER REQUEST ANSWER``."""
    request = Request.read(sys.argv[1])
    answer = Answer(versions=versions())
    started = time.perf_counter()
    engine = load(request)
    answer.load_s = time.perf_counter() - started
    measure(engine, request, answer)
    answer.peak_bytes = peak_resident_bytes()
    write(sys.argv[2], answer)


def measure(engine: Engine, request: Request, answer: Answer) -> None:
    """Runs every case of ``request`` and notes its rates, or why it has none, in ``answer``."""
    numbers = random.Random(request.seed)
    rate(engine, Case(batch=1, context=128, new_tokens=8), request.vocab_size, numbers)  # touches every expert
    for case in request.cases:
        try:
            spent, rates = 0.0, list[float]()
            while spent < ENOUGH_S and len(rates) < MAX_REPEATS:
                started = time.perf_counter()
                rates.append(rate(engine, case, request.vocab_size, numbers))
                spent += time.perf_counter() - started
            answer.rates[case.name] = rates
        except Exception as error:  # whatever a peer raises is the reason its column stays empty
            traceback.print_exc()
            answer.failed[case.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def rate(engine: Engine, case: Case, vocab_size: int, numbers: random.Random) -> float:
    """Tokens per second of one run of ``case``.

    Raises:
        RuntimeError: the engine gave another number of tokens than it was asked for.
    """
    prompts = [[numbers.randrange(vocab_size) for _ in range(case.context)] for _ in range(case.batch)]
    produced, first, prefilled = 0, 0, 0.0
    started = time.perf_counter()
    for given in engine(prompts, case.new_tokens, numbers):
        produced += given
        if not prefilled and produced >= case.batch:
            first, prefilled = produced, time.perf_counter()
    ended = time.perf_counter()
    if produced != case.batch * case.new_tokens:
        raise RuntimeError(f"{produced} tokens came back, needs {case.batch} x {case.new_tokens}")
    if case.new_tokens == 1:
        return case.batch * case.context / (prefilled - started)
    return (produced - first) / (ended - prefilled)


def peak_resident_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; needs Linux")
