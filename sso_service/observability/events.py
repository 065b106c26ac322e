"""Recording the events of a serving process, in its metrics and in its log.

Use cases that only the service runs, such as issuing and redeeming, record here. Use cases that commands run as well
use `audit.record`: a command has nothing to count, and must not import `prometheus_client` (see `metrics`).
"""

from sso_service.observability import audit, metrics
from sso_service.observability.audit import Event


def record(event: Event) -> None:
    """Count the event and write it to the log."""
    metrics.count(event)
    audit.record(event)
