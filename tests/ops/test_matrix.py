"""The matrix rate: of every unit this processor has, and a refusal for the others."""

import os
import subprocess
import sys

import pytest

from ops import library
from ops.matrix import NAMES, MatrixUnit, units


def test_every_unit_has_a_rate():
    assert units()[0] == "float32"
    for name in units():
        assert MatrixUnit(name).rate() > 0


def test_operations_are_those_of_all_threads():
    threads = library.num_threads()
    try:
        counts = []
        for n in (1, 2):
            library.set_num_threads(n)
            unit = MatrixUnit("float32")
            unit._rounds = 1000
            counts.append(unit._run()[0])
        assert counts[1] == 2 * counts[0] > 0
    finally:
        library.set_num_threads(threads)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match=r"matrix unit is 'abacus', needs one of float32, avx512_bf16"):
        MatrixUnit("abacus")


def test_what_the_processor_or_the_kernels_lack_is_refused_by_name():
    script = "from ops.matrix import MatrixUnit, units; print(units()); MatrixUnit('amx_int8')"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PADDLE_MIXTRAL_ISA": "baseline", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "['float32']\n"
    assert "this processor has no amx_int8 for the baseline kernels; use one of float32" in result.stderr


def test_names_are_in_the_order_of_the_header():
    header = (library.PATH.parent / "csrc/kernels/include/matrix.h").read_text()
    assert [f"PM_UNIT_{name.upper()} = {i}," in header for i, name in enumerate(NAMES)] == [True] * len(NAMES)
