"""64 clients stream at once: no error, tokens in order, the text of the offline run, nothing leaked."""

from predict.llm import LLM
from tests.benchmarks.load import check_load, offline_texts, requests
from tests.predict.served import serving

CLIENTS = 64


def test_64_streams_say_what_the_offline_run_says(demo):
    wanted = requests(CLIENTS, max_tokens=40)
    expected = offline_texts(LLM(demo), wanted)
    with serving(LLM(demo)) as served:
        report = check_load(served.url, wanted, expected, CLIENTS)
        served.wait_until_idle()
        assert served.stats.running == 0
    assert report.answers == CLIENTS
