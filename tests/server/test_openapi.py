"""The OpenAPI document says what the server does: schemathesis draws right and wrong requests from it."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from .conftest import MODEL, Running, wait_until

CHECKS = [
    schemathesis.checks.not_a_server_error,
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
ENDLESS = "events"  # streams that do not end by themselves


@pytest.fixture(scope="module")
def small(llama_dir):
    """A server whose longest answers are short."""
    with Running(llama_dir, max_model_len=48, max_num_seqs=4, max_num_batched_tokens=32) as running:
        yield running


@pytest.mark.parametrize("num_examples", [3, pytest.param(200, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_requests_drawn_from_the_document(small, mode, num_examples, seed):
    """Each gets an answer with a status, a type and a content that the document has, and no error of ours."""
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations = [each.ok() for each in schema.exclude(path_regex=ENDLESS).get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= {each.path for each in operations}
    for operation in operations:
        if not operation.body and mode is GenerationMode.NEGATIVE:  # nothing can be wrong
            continue

        @hypothesis.seed(seed)
        @settings(max_examples=num_examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def check(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL  # all others have the same answer
            ask(case)

        check()
    wait_until(lambda: small.async_engine.stats().gpu_cache_usage == 0)


def ask(case: schemathesis.Case) -> None:
    response = case.call(timeout=60)
    case.validate_response(response, checks=CHECKS)
