"""What nvcc says of the CUDA kernels: no warning, and those for few tokens spill no register on A100 or H100.

The build itself (setup.py) compiles them for every architecture shipped, in `make` with warnings as errors. Here the
front end, which takes longest, runs once: one PTX, assembled for both.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from ops.csrc import nvcc

REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?(?P<spilled>\d+) bytes spill stores", re.DOTALL
)


ARCHITECTURES = "sm_80", "sm_90"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[tuple[str, str], int]:
    """Bytes of registers spilled by (kernel, architecture), of every kernel there is."""
    if nvcc.find() is None:
        pytest.skip("no nvcc here (on the PATH, in /usr/local/cuda or as $NVCC): nothing of CUDA was compiled")
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(source) -> str:
        both = [f"-gencode=arch=compute_80,code=[{','.join(ARCHITECTURES)}]"]
        command = [*nvcc.compile_command(source, folder / f"{source.stem}.o", both), "-Xptxas", "-v"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{source.name}\n{done.stdout}"
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        text = "".join(pool.map(compile_one, nvcc.sources()))
    return {(m["kernel"], m["arch"]): int(m["spilled"]) for m in REPORT.finditer(text)}


def test_every_kernel_compiles_without_a_warning(reports):
    first, second = ({kernel for kernel, of in reports if of == architecture} for architecture in ARCHITECTURES)
    assert first == second != set()


def test_kernels_for_few_tokens_spill_no_register(reports):
    decode = {key: spilled for key, spilled in reports.items() if "decode" in key[0]}
    assert decode, "no kernel has `decode` in its name"
    assert {key: spilled for key, spilled in decode.items() if spilled} == {}
