"""The weights of an exported program: one safetensors file a rank, in the kernels' layout.

Names are those of the network's buffers (layers.0.w13, layers.0.w13_scale, ...) and of the program's inputs. Data
begins on a page of the file; tensors whose size is a multiple of a page, half a page, ... come first and begin on such.

Decoding reads nearly all of this memory for every token, so it should lie in huge pages. Where the system caches files
in huge pages (as Linux 6.18 on ext4 does) the file is mapped: nothing is copied, and all processes that run the same
export share it. Even there a file written in small pieces, as copying tools do, lies in small pages: then it is dropped
from the cache and read once more, unless the disk is slow. Elsewhere a mapping would decode slower by 15 to 50 %, so
the file is copied into huge pages of our own.
"""

import json
import mmap
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddle.base.core import Place
from tqdm import tqdm

from ops import library
from predict.artifact import ArtifactError
from predict.model.checkpoint import TensorEntry, read_header
from predict.model.memory import empty, host_view, on_device
from predict.progress import progress

PAGE = 4096
CHUNK = 8 << 20  # bytes read or written at a time: whole huge pages of the file, so that it is cached in such
# A mapping of which this share lies in huge pages reads as fast as a copy, within what can be measured.
HUGE_SHARE = 0.9
PROBE = 8 * CHUNK  # bytes of the file that show whether, and how fast, it is read into huge pages
READING_AGAIN_PAYS = 0.5e9  # bytes a second from disk, about what copying into new memory reaches on a virtual machine
_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
_SAFETENSORS_NAMES = {"uint8": "U8", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# NumPy has no bfloat16.
_NUMPY_TYPES = {"uint8": np.uint8, "float32": np.float32, "bfloat16": np.int16, "float16": np.float16}
Kind = tuple[str, tuple[int, ...]]  # element type, shape


def write_weights(path: Path, weights: Mapping[str, paddle.Tensor], show: bool = True) -> None:
    """Writes tensors from the memory they are in, with a progress bar if ``show``."""
    views = {name: _bytes(weights[name]) for name in sorted(weights, key=lambda n: _alignment(weights[n]))}
    header: dict[str, dict] = {}
    end = 0
    for name, view in views.items():
        dtype, shape = _kind(weights[name])
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [end, end + view.size]}
        end += view.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # which the format allows for alignment
    with open(path, "wb", buffering=0) as stream, progress("writing weights", end, "B", show) as bar:
        stream.write(len(text).to_bytes(8, "little") + text)
        for view in views.values():
            done = 0
            while done < view.size:
                count = stream.write(view[done:][: CHUNK - stream.tell() % CHUNK].data)
                bar.update(count)
                done += count


def read_weights(
    path: Path, needed: Mapping[str, Kind], show: bool = True, place: Place | None = None
) -> dict[str, paddle.Tensor]:
    """The tensors of a file, mapped or copied (see above), with a progress bar if ``show``.

    A mapped file must not be changed in place while it is in use: cutting it short ends the process (SIGBUS). Deleting
    it, or exporting again, does no harm. Where memory runs short, the system may drop its pages and read them again.

    Args:
        needed: name, element type ("uint8", "float32", "bfloat16" or "float16") and shape of every tensor the file must
            hold.
        place: a device to copy them to, one by one; None: they stay on the CPU.

    Raises:
        CheckpointError: the header is damaged.
        ArtifactError: the file does not hold exactly what is needed, or ends early.
    """
    header = read_header(path)
    found = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
    wanted = {name: (_SAFETENSORS_NAMES[dtype], shape) for name, (dtype, shape) in needed.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ArtifactError(
                f"{path}: holds {_text(found.get(name))} for {name}, the program beside it needs "
                f"{_text(wanted.get(name))}: the two are not of one export; export it again"
            )
    with progress("loading weights", path.stat().st_size, "B", show) as bar:
        if place is not None:
            return _on_device(path, header, needed, place, bar)
        size = path.stat().st_size
        mapping = _map(path, size, bar.update)
        if mapping is None and _drop_to_read_again(path, size):
            bar.reset()
            mapping = _map(path, size, bar.update)
        if mapping is not None:
            return {name: _mapped(mapping, header[name].offset, *kind) for name, kind in needed.items()}
        bar.reset()
        return _copy(path, header, needed, bar)


def _map(path: Path, size: int, advance: Callable[[int], object]) -> mmap.mmap | None:
    """The first ``size`` bytes of the file, read and mapped; None if that did not give huge pages."""
    before = _huge_bytes()
    try:
        # Private and writable: NumPy 1 lends nothing else; pages that nobody writes to are shared all the same.
        with open(path, "rb") as stream:
            mapping = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, CHUNK):
            length = min(CHUNK, size - at)
            mapping.madvise(_MADV_POPULATE_READ, at, length)
            advance(length)
    except OSError:  # a file system that maps nothing, or a Linux that does not know one of the two
        return None
    return mapping if _huge_bytes() - before >= HUGE_SHARE * size else None


def _drop_to_read_again(path: Path, size: int) -> bool:
    """Drops the file from the system's cache if its disk gives it back in huge pages, and faster than it is copied.

    What another process has mapped, and what is not yet on disk, stays in the cache.
    """
    with open(path, "rb") as stream:
        probe = min(PROBE, size)
        os.posix_fadvise(stream.fileno(), 0, probe, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        mapping = _map(path, probe, lambda length: None)
        if mapping is None or probe < READING_AGAIN_PAYS * (time.perf_counter() - started):
            return False
        mapping.close()
        os.posix_fadvise(stream.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
    return True


def _huge_bytes() -> int:
    """Bytes of files that this process has mapped in huge pages."""
    found = re.search(r"^FilePmdMapped: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _mapped(mapping: mmap.mmap, offset: int, dtype: str, shape: tuple[int, ...]) -> paddle.Tensor:
    """A tensor in the mapping's memory, which it keeps alive."""
    array = np.frombuffer(mapping, _NUMPY_TYPES[dtype], int(np.prod(shape)), offset).reshape(shape)
    tensor = paddle.from_dlpack(array)
    return tensor.view("bfloat16") if dtype == "bfloat16" else tensor


def _on_device(
    path: Path, header: Mapping[str, TensorEntry], needed: Mapping[str, Kind], place: Place, bar: tqdm
) -> dict[str, paddle.Tensor]:
    with open(path, "rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    weights = {}
    for name in sorted(needed, key=lambda n: header[n].offset):
        weights[name] = on_device(_mapped(mapping, header[name].offset, *needed[name]), place)
        bar.update(weights[name].size * weights[name].element_size())
    return weights


def _copy(
    path: Path, header: Mapping[str, TensorEntry], needed: Mapping[str, Kind], bar: tqdm
) -> dict[str, paddle.Tensor]:
    weights = {name: empty(list(shape), dtype) for name, (dtype, shape) in needed.items()}
    chunks = []
    for name in sorted(weights, key=lambda n: header[n].offset):
        view = _bytes(weights[name])
        chunks += [(view[at : at + CHUNK], header[name].offset + at) for at in range(0, view.size, CHUNK)]
    with open(path, "rb", buffering=0) as stream, ThreadPoolExecutor(library.num_threads()) as pool:
        for size in pool.map(lambda chunk: _read(stream.fileno(), path, *chunk), chunks):
            bar.update(size)
    return weights


def _read(file: int, path: Path, target: np.ndarray, offset: int) -> int:
    done = 0
    while done < target.size:
        count = os.preadv(file, [target[done:].data], offset + done)
        if count == 0:
            raise ArtifactError(f"{path}: ends at byte {offset + done} while being read; copy or export it again")
        done += count
    return done


def _alignment(tensor: paddle.Tensor) -> int:
    """Sorts to the front what ends on a multiple of a higher power of two: what follows begins there."""
    size = _bytes(tensor).size
    return -min(size & -size, PAGE)


def _text(kind: Kind | None) -> str:
    return "nothing" if kind is None else f"{kind[0]} {list(kind[1])}"


def _bytes(tensor: paddle.Tensor) -> np.ndarray:
    return host_view(tensor).reshape(-1).view(np.uint8)


def _kind(tensor: paddle.Tensor) -> Kind:
    return str(tensor.dtype).removeprefix("paddle."), tuple(tensor.shape)
