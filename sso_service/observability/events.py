"""Recording the events of a serving process, in its metrics and in its log.

Use cases that only the service runs, such as issuing and redeeming, record here. Use cases that commands run as well
use `audit.record`: a command has nothing to count, and must not import `prometheus_client` (see `metrics`).
"""

from collections import OrderedDict

from sso_service.observability import audit, metrics
from sso_service.observability.audit import Event, EventName
from sso_service.observability.limit import LineLimit

_MOST_REMEMBERED = 1024
"""Refused login tokens that are remembered, each by its `ref`. About 150 KB."""


class RefusalLimit:
    """Decides which refusals are logged: anyone can cause most of them, as often as they like.

    A refusal is limited if it names no user and, at the API, no API token. Any client can make a frontend check a
    forged login token, so its API token does not count there. A genuine login token can be presented again and again as
    well: each is logged when it is refused for the first time, and at a limited rate from then on.
    """

    def __init__(self) -> None:
        self._anonymous = LineLimit("refusals without a genuine token")
        self._repeated = LineLimit("further refusals of the same login tokens")
        self._refused: OrderedDict[tuple[str | None, str | None], None] = OrderedDict()

    def admits(self, event: Event) -> bool:
        """Return whether the event is to be logged."""
        if event.event is EventName.API_REFUSED:
            return event.api_token_id is not None or self._anonymous.admits()
        if event.event is not EventName.LOGIN_REFUSED:
            return True
        if event.user_id is None:
            return self._anonymous.admits()
        return not self._is_repeated(event) or self._repeated.admits()

    def _is_repeated(self, event: Event) -> bool:
        key = event.ref, event.reason
        repeated = key in self._refused
        self._refused[key] = None
        self._refused.move_to_end(key)
        if len(self._refused) > _MOST_REMEMBERED:
            self._refused.popitem(last=False)
        return repeated


_limit = RefusalLimit()


def record(event: Event) -> None:
    """Count the event and write it to the log. Refusals are always counted, but not always logged."""
    metrics.count(event)
    if _limit.admits(event):
        audit.record(event)
