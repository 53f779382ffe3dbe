"""What nvcc says of the CUDA kernels: they compile for every GPU shipped for; those for few tokens spill nothing."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from ops.csrc import nvcc

REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?(?P<spilled>\d+) bytes spill stores", re.DOTALL
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[tuple[str, str], int]:
    """Bytes of registers spilled by (kernel, architecture), of every kernel there is."""
    if nvcc.find() is None:
        pytest.skip("no nvcc here (on the PATH, in /usr/local/cuda or as $NVCC): nothing of CUDA was compiled")
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(source) -> str:
        command = [*nvcc.compile_command(source, folder / f"{source.stem}.o", nvcc.SHIPPED), "-Xptxas", "-v"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{source.name}\n{done.stdout}"
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        text = "".join(pool.map(compile_one, nvcc.sources()))
    return {(m["kernel"], m["arch"]): int(m["spilled"]) for m in REPORT.finditer(text)}


def test_every_kernel_compiles_for_every_architecture_shipped(reports):
    kernels = {arch: {kernel for kernel, of in reports if of == arch} for arch in ("sm_80", "sm_90a")}
    assert kernels["sm_80"] == kernels["sm_90a"] != set()


def test_kernels_for_few_tokens_spill_no_register(reports):
    decode = {key: spilled for key, spilled in reports.items() if "decode" in key[0]}
    assert decode, "no kernel has `decode` in its name"
    assert {key: spilled for key, spilled in decode.items() if spilled} == {}
