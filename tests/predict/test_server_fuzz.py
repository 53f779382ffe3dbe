"""Requests drawn from the server's own OpenAPI schema, valid and not: what is promised is answered, nothing leaks."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.predict.served import ModellessLLM, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def served():
    with serving(ModellessLLM()) as running:
        yield running
        assert running.end() == 0


@pytest.fixture(scope="module")
def api(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_every_route_is_fuzzed(api):
    assert {(op.ok().method.upper(), op.ok().path) for op in api.get_all_operations()} == set(ROUTES)


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_any_request_is_answered_as_documented(served, api, method, path, mode):
    operation = api[path][method]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # nothing that could be wrong

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def answer(case):
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        assert response.status_code < 400 or len(response.content) < 4096

    answer()
    assert served.http.get("/health").status_code == 200
    served.wait_until_idle()
