"""The generated reference pages match the code that they describe."""

import pytest

from scripts.tools import reference
from sso_service.observability import audit, metrics


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_reference_page_matches_the_code(page: str) -> None:
    assert page not in reference.outdated(), "run: .venv/bin/python -m scripts.tools.reference"


def test_every_audit_event_has_a_description_with_existing_fields() -> None:
    assert set(audit.DESCRIPTIONS) == set(audit.EventName)
    fields = {field for _, fields in audit.DESCRIPTIONS.values() for field in fields}
    assert fields == set(audit.Event.__struct_fields__) - {"event"}


def test_every_metric_label_has_a_description() -> None:
    assert {label for _, _, labels, _, _ in reference.counted() for label in labels} == set(metrics.LABELS)
