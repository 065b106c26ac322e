"""Errors as HTTP responses: which ones a client may see, and which ones are bugs."""

import json

import pytest

from sso_service.errors import NoAccess, OperatorError, RoleForbidden, SchemaMismatch, ServiceError
from sso_service.web.problems import ErrorResponses, problem_of


def test_an_error_of_the_table_is_described_to_the_client() -> None:
    for error in (NoAccess(), RoleForbidden()):
        described = problem_of(error)
        assert described is not None
        assert (described.status, described.code) == (403, "no_access")


@pytest.mark.parametrize("error", [ServiceError("one"), OperatorError("one"), SchemaMismatch("one"), ValueError("one")])
def test_an_error_that_no_client_can_cause_is_a_bug(error: Exception) -> None:
    # The application raises a bug again, so that the server logs it. It recognizes bugs by this None.
    assert problem_of(error) is None
    response = ErrorResponses().json(error)
    assert (response.status_code, json.loads(bytes(response.body))["error"]["code"]) == (500, "internal_error")
