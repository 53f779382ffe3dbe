import os

import pytest

from predict.processors import processors

ALLOWED = len(os.sched_getaffinity(0))


def files(folder, contents: dict[str, str]):
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, ALLOWED),
        ({"cpu.max": "max 100000"}, ALLOWED),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "30000 100000"}, 1),
        ({"cpu.max": f"{ALLOWED * 100000 - 1} 100000"}, ALLOWED),
        ({"cpu.max": f"{8 * ALLOWED * 100000} 100000"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),
    ],
)
def test_no_more_threads_than_the_control_group_has_time_for(tmp_path, contents, expected):
    assert processors(files(tmp_path, contents)) == expected


def test_a_second_processor_counts_when_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert processors(files(tmp_path, {"cpu.max": "110000 100000"})) == 2
