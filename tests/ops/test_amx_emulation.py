"""The amx kernels of the library as it ships where the processor has no AMX: their tile instructions are emulated."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from predict.llm import LLM
from predict.model.weights import DEMO
from setup import ISA_FLAGS, KERNEL_FLAGS
from tests.ops import test_linear, test_moe
from tests.ops.amx_emulation import configuration
from tests.ops.instruction_sets import NEEDED, digests

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).with_name("amx_emulation")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a process that has AMX."""
    processor = Path("/proc/cpuinfo").read_text()
    if NEEDED["amx"] in processor:
        pytest.skip("this processor has AMX, so that test_amx.py and the other tests run on it")
    if NEEDED["avx512_vnni"] not in processor:
        pytest.skip("this processor has no AVX-512 with VNNI, which the amx kernels use beside the tiles")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("amx") / "amx_emulation.so"
    flags = [*KERNEL_FLAGS, *ISA_FLAGS["avx512"]]
    subprocess.run(["g++", *flags, "-shared", EMULATION / "trap.cc", "-o", library], check=True)
    # Passive: a thread that waits for one whose instructions are emulated would take a processor from others.
    return {"LD_PRELOAD": str(library), "PADDLE_MIXTRAL_ISA": "amx", "OMP_WAIT_POLICY": "passive"}


# Those in which tiles are multiplied; that rows do not depend on their batch, too, follows for int8 from exact sums.
TESTS = [
    "test_amx.py",
    "test_linear.py::test_linear_bf16_is_the_reference",
    "test_linear.py::test_more_tokens_than_a_block_holds_in_bf16",
    "test_linear.py::test_denormals_and_what_is_not_finite_in_bf16",
    "test_linear.py::test_weight_only_linear_is_the_reference",
    "test_linear.py::test_rows_without_a_scale",
    "test_linear.py::test_rows_do_not_depend_on_their_batch_or_the_threads[bfloat16-16]",
    "test_moe.py::test_fused_moe_is_the_reference",
    "test_moe.py::test_tokens_do_not_depend_on_their_batch_or_the_threads[bfloat16]",
    "test_matrix.py::test_every_unit_has_a_rate",
]


def test_the_kernels_of_the_library(environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys"]
    command += [f"tests/ops/{test}" for test in TESTS]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ passed in ", run.stdout, re.MULTILINE), run.stdout  # and none was skipped


def digest() -> dict[str, str]:
    """Of int8: products, experts, and what the demo model says, tokens and log-probabilities."""
    from tests.system.test_same_tokens import outcome, requests

    found = {"linear": test_linear.digest()["int8"]}
    found |= {dtype: test_moe.digest()[dtype] for dtype in ("int8", "a8w8")}
    prompts, params = requests(DEMO)
    for quant_type in ("weight_only_int8", "a8w8"):
        said = outcome(LLM(DEMO, quant_type=quant_type), prompts[:8], params[:8])
        found[f"demo, {quant_type}"] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return found


def test_int8_has_the_bits_of_this_processor(environment):
    assert digests("test_amx_emulation", ["amx"], environment) == {"amx": digest()}


GOOD = configuration({0: (4, 64), 1: (4, 64), 2: (16, 64), 3: (16, 64)})


def changed(byte: int, value: int):
    other = GOOD.copy()
    other[byte] = value
    return other


def tiles(*sizes: tuple[int, int]):
    return configuration(dict(enumerate(sizes)))


NOTHING_LOADED = "#UD: no configuration of tiles is loaded"
NO_SUCH_TILE = "#UD: there is no tile above 7"
NO_FORM = "#UD: no tile instruction has this form"
NOT_DISTINCT = "#UD: the three tiles of a product are not distinct"
NOT_CONFIGURED = "#UD: the configuration does not have this tile"
NOT_WORDS = "#UD: a row of the tile is not a number of words"
OTHER = "neither this processor nor the emulation has this instruction"
LOAD = "c4 e2 78 49 07"  # ldtilecfg (%rdi)
ACCEPTED = {
    "nothing": (GOOD, ""),
    "a configuration, and its release": (GOOD, f"{LOAD} c4 e2 78 49 c0"),
    "tilezero of rows of 62 bytes": (tiles((4, 62)), f"{LOAD} c4 e2 7b 49 c0"),
    "palette 0": (configuration({}, palette=0), LOAD),
    "a product of bytes": (GOOD, f"{LOAD} c4 e2 6b 5e c1"),
    "a product of bfloat16": (GOOD, f"{LOAD} c4 e2 6a 5c c1"),
}
# Configuration, code, and what is said of it. A product of tiles 1 and 2 added to tile 0 is c4 e2 6b 5e c1 (tdpbssd):
# its third byte names the second operand (inverted, from bit 3) and the prefix, its fifth the sums (from bit 3) and the
# first operand.
REFUSED = {
    "tilezero, nothing loaded": (GOOD, "c4 e2 7b 49 c0", NOTHING_LOADED),
    "tilezero after tilerelease": (GOOD, f"{LOAD} c4 e2 78 49 c0 c4 e2 7b 49 c0", NOTHING_LOADED),
    "tileloadd, nothing loaded": (GOOD, "c4 e2 7b 4b 04 26", NOTHING_LOADED),
    "tilestored, nothing loaded": (GOOD, "c4 e2 7a 4b 04 26", NOTHING_LOADED),
    "tdpbssd, nothing loaded": (GOOD, "c4 e2 6b 5e c1", NOTHING_LOADED),
    "tilezero after palette 0": (configuration({}, palette=0), f"{LOAD} c4 e2 7b 49 c0", NOTHING_LOADED),
    "tilezero of tile 4": (GOOD, f"{LOAD} c4 e2 7b 49 e0", NOT_CONFIGURED),
    "tileloadd of tile 4": (GOOD, f"{LOAD} c4 e2 7b 4b 24 26", NOT_CONFIGURED),
    "tilestored of tile 4": (GOOD, f"{LOAD} c4 e2 7a 4b 24 26", NOT_CONFIGURED),
    "product to tile 4": (GOOD, f"{LOAD} c4 e2 6b 5e e1", NOT_CONFIGURED),
    "product of tile 4": (GOOD, f"{LOAD} c4 e2 6b 5e c4", NOT_CONFIGURED),
    "product with tile 4": (GOOD, f"{LOAD} c4 e2 5b 5e c1", NOT_CONFIGURED),
    "tilezero of tile 8": (GOOD, f"{LOAD} c4 62 7b 49 c0", NO_SUCH_TILE),
    "product to tile 8": (GOOD, f"{LOAD} c4 62 6b 5e c1", NO_SUCH_TILE),
    "product of tile 9": (GOOD, f"{LOAD} c4 c2 6b 5e c1", NO_SUCH_TILE),
    "product with tile 10": (GOOD, f"{LOAD} c4 e2 2b 5e c1", NO_SUCH_TILE),
    "tileloadd of rows of 62 bytes": (tiles((4, 62)), f"{LOAD} c4 e2 7b 4b 04 26", NOT_WORDS),
    "tilestored of rows of 62 bytes": (tiles((4, 62)), f"{LOAD} c4 e2 7a 4b 04 26", NOT_WORDS),
    "product of rows of 62 bytes": (tiles((4, 64), (4, 62), (15, 64)), f"{LOAD} c4 e2 6b 5e c1", NOT_WORDS),
    "tdpbssd, sums and first operand": (GOOD, f"{LOAD} c4 e2 6b 5e c0", NOT_DISTINCT),
    "tdpbssd, both operands": (GOOD, f"{LOAD} c4 e2 6b 5e c2", NOT_DISTINCT),
    "tdpbssd, sums and last operand": (GOOD, f"{LOAD} c4 e2 6b 5e d1", NOT_DISTINCT),
    "tdpbf16ps, both operands": (GOOD, f"{LOAD} c4 e2 6a 5c c2", NOT_DISTINCT),
    "rows": (
        tiles((4, 64), (5, 64), (16, 64)),
        f"{LOAD} c4 e2 6b 5e c1",
        "#UD: the sums have not as many rows as the first operand",
    ),
    "words": (
        tiles((4, 64), (4, 32), (16, 64)),
        f"{LOAD} c4 e2 6b 5e c1",
        "#UD: a row of the first operand has not as many words as the second has rows",
    ),
    "columns": (
        tiles((4, 32), (4, 64), (16, 64)),
        f"{LOAD} c4 e2 6a 5c c1",
        "#UD: the sums have not as many columns as the second operand",
    ),
    "tileloadd (%rsi), not as SIB": (GOOD, f"{LOAD} c4 e2 7b 4b 06", "#UD: the address of a tile has no SIB byte"),
    "tileloadd without a base": (
        GOOD,
        f"{LOAD} c4 e2 7b 4b 04 0d 00 00 00 00",
        "not emulated: an address without a base register",
    ),
    "VEX.W": (GOOD, f"{LOAD} c4 e2 fb 49 c0", "#UD: VEX.W or VEX.L is set"),
    "VEX.L": (GOOD, f"{LOAD} c4 e2 7f 49 c0", "#UD: VEX.W or VEX.L is set"),
    "tilezero with a third operand": (GOOD, f"{LOAD} c4 e2 73 49 c0", NO_FORM),
    "tileloadd with a third operand": (GOOD, f"{LOAD} c4 e2 73 4b 04 26", NO_FORM),
    "tileloadd of registers": (GOOD, f"{LOAD} c4 e2 7b 4b c1", NO_FORM),
    "tileloadd without a prefix": (GOOD, f"{LOAD} c4 e2 78 4b 04 26", NO_FORM),
    "ldtilecfg with a register": (GOOD, "c4 e2 78 49 0f", NO_FORM),
    "ldtilecfg with f2": (GOOD, "c4 e2 7b 49 07", NO_FORM),
    "tilerelease with a register": (GOOD, "c4 e2 78 49 c1", NO_FORM),
    "a product from memory": (GOOD, f"{LOAD} c4 e2 6b 5e 06", NO_FORM),
    "tdpfp16ps": (GOOD, f"{LOAD} c4 e2 6b 5c c1", "#UD: a product of neither bytes nor bfloat16"),
    "ud2": (GOOD, "0f 0b", OTHER),
    "tilezero behind 66": (GOOD, f"{LOAD} 66 c4 e2 7b 49 c0", OTHER),
    "tilezero behind lock": (GOOD, f"{LOAD} f0 c4 e2 7b 49 c0", OTHER),
    "palette 2": (changed(0, 2), LOAD, "#GP: the palette is neither 0 nor 1"),
    "start_row": (changed(1, 1), LOAD, "not emulated: a configuration whose start_row is not zero"),
    "byte 2": (changed(2, 1), LOAD, "#GP: a reserved byte of the configuration, 2 to 15, is not zero"),
    "byte 15": (changed(15, 1), LOAD, "#GP: a reserved byte of the configuration, 2 to 15, is not zero"),
    "bytes of tile 8": (changed(32, 1), LOAD, "#GP: the configuration has a tile above 7"),
    "rows of tile 15": (changed(63, 1), LOAD, "#GP: the configuration has a tile above 7"),
    "17 rows": (changed(48, 17), LOAD, "#GP: a tile has more than 16 rows"),
    "65 bytes": (changed(18, 65), LOAD, "#GP: a tile has rows of more than 64 bytes"),
    "320 bytes": (changed(19, 1), LOAD, "#GP: a tile has rows of more than 64 bytes"),
    "no rows": (changed(48, 0), LOAD, "#GP: a tile has rows without bytes, or bytes without rows"),
    "no bytes": (changed(16, 0), LOAD, "#GP: a tile has rows without bytes, or bytes without rows"),
}


@pytest.fixture(scope="module")
def outcomes(environment) -> dict[str, tuple[int, str]]:
    """How each piece of code ended, and what it said."""
    pieces = ACCEPTED | REFUSED
    run = subprocess.run(
        [sys.executable, EMULATION / "try_codes.py"],
        input=json.dumps([(piece[0].tobytes().hex(), piece[1]) for piece in pieces.values()]),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(pieces, map(tuple, json.loads(run.stdout)), strict=True))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_processor_does_is_done(outcomes, name):
    assert outcomes[name] == (0, "")


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_processor_refuses_ends_the_process(outcomes, name):
    status, said = outcomes[name]
    assert status == -signal.SIGILL
    assert said.startswith(f"amx emulation: {REFUSED[name][2]}; the code is ")
