"""Recording the events of a serving process, in its metrics and in its log.

Use cases that only the service runs, such as issuing and redeeming, record here. Use cases that commands run as well
use `audit.record`: a command has nothing to count, and must not import `prometheus_client` (see `metrics`).
"""

from sso_service.observability import audit, metrics
from sso_service.observability.audit import Event, EventName
from sso_service.observability.limit import LineLimit

# Anyone can cause these refusals, as often as they like. All others need a genuine login token or API token.
_ANONYMOUS = {
    EventName.LOGIN_REFUSED: {"malformed", "bad_signature"},
    EventName.API_REFUSED: {"not_authenticated"},
}
_limit = LineLimit("refusals of forged or malformed tokens")


def record(event: Event) -> None:
    """Count the event and write it to the log. Refusals of anonymous clients are always counted, not always logged."""
    metrics.count(event)
    is_anonymous = event.api_token_id is None and event.reason in _ANONYMOUS.get(event.event, ())
    if not is_anonymous or _limit.admits():
        audit.record(event)
