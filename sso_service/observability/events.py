"""Recording the events of a serving process, in its metrics and in its log.

Use cases that only the service runs, such as issuing and redeeming, record here. Use cases that commands run as well
use `audit.record`: a command has nothing to count, and must not import `prometheus_client` (see `metrics`).
"""

from sso_service.observability import audit, metrics
from sso_service.observability.audit import Event, EventName
from sso_service.observability.limit import LineLimit

# Anyone can cause these refusals, as often as they like, unless they name a user or an API token: that needs a genuine
# login token or API token.
_REFUSALS = frozenset({EventName.LOGIN_REFUSED, EventName.API_REFUSED})
_limit = LineLimit("refusals without a genuine token")


def record(event: Event) -> None:
    """Count the event and write it to the log. Refusals of anonymous clients are always counted, not always logged."""
    metrics.count(event)
    is_anonymous = event.event in _REFUSALS and event.api_token_id is None and event.user_id is None
    if not is_anonymous or _limit.admits():
        audit.record(event)
