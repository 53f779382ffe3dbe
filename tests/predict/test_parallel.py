"""predict.parallel's reading of the launcher's environment."""

import pytest

from ops.collective import group
from predict import parallel
from predict.processors import processors

LAUNCHED = {
    "PADDLE_TRAINER_ID": "1",
    "PADDLE_TRAINERS_NUM": "4",
    "PADDLE_LOCAL_SIZE": "4",
    "PADDLE_MASTER": "127.0.0.1:4000",
    "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:4001,127.0.0.1:4002,127.0.0.1:4003,127.0.0.1:4004",
    "POD_NAME": "abcdef",
    "PADDLE_MIXTRAL_GROUP_TIMEOUT": "0.05",
}


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment of rank 1 of 4, changed as asked; nobody else will join."""

    def set_environment(**changes):
        for variable, value in {**LAUNCHED, **changes}.items():
            monkeypatch.setenv(variable, value)

    monkeypatch.setattr(parallel, "_die_with_launcher", lambda: None)
    return set_environment


def test_without_a_launcher_it_is_rank_0_of_1(monkeypatch):
    for variable in LAUNCHED:
        monkeypatch.delenv(variable, raising=False)
    assert parallel.join() == parallel.Ranks(0, 1, processors())
    assert group() == (0, 1)
    parallel.barrier()
    assert parallel.run(lambda ranks: ranks.rank + 7) == 7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, r"rank 1 of 4 waited up to 0\.05 s for the other ranks"),
        ({"PADDLE_LOCAL_SIZE": "2"}, "the job has 4 ranks, 2 of them from this machine's launcher"),
        ({"PADDLE_TRAINER_ENDPOINTS": "a:1,a:2,b:1,b:2"}, r"hosts a, b.*start all on one with --nproc_per_node"),
        ({"PADDLE_TRAINER_ID": "x"}, "PADDLE_TRAINER_ID is 'x', needs the number"),
        ({"PADDLE_TRAINERS_NUM": "0"}, "PADDLE_TRAINERS_NUM is '0', needs the number"),
        ({"PADDLE_TRAINER_ID": "4"}, "rank is 4, needs 0 to 3"),
        ({"PADDLE_MIXTRAL_GROUP_TIMEOUT": "soon"}, "PADDLE_MIXTRAL_GROUP_TIMEOUT is 'soon', needs a positive number"),
    ],
)
def test_join_refuses_by_name(launched, changes, sentence):
    launched(**changes)
    with pytest.raises(ValueError, match=sentence):
        parallel.join()


def test_jobs_have_names_of_their_own(launched):
    launched()
    name = parallel._job_name()
    assert name == parallel._job_name()
    launched(POD_NAME="ghijkl")
    assert name != parallel._job_name()
