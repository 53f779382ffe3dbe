"""Machine code, each piece in a process of its own: how it ended, and what it said.

Reads [[configuration, code], ...] in hexadecimal as JSON: code is called with %rdi the address of the configuration and
%rsi that of 2 KiB of memory. Writes [[exit status, stderr], ...].
"""

import ctypes
import json
import mmap
import os
import resource
import sys

CONFIGURATION, DATA = 1024, 2048  # offsets in memory
RETURN = b"\xc3"


def execute(configuration: bytes, code: bytes) -> None:
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code + RETURN)
    memory[CONFIGURATION : CONFIGURATION + len(configuration)] = configuration
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(start)(start + CONFIGURATION, start + DATA)


def outcome(configuration: bytes, code: bytes) -> tuple[int, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, sys.stderr.fileno())
        execute(configuration, code)
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps([outcome(*map(bytes.fromhex, piece)) for piece in json.load(sys.stdin)]))
