"""Recovery times: how soon a node responds again after a fault."""

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from scripts.tools.proof.history import AnyRecord, Fault, Issue, Redeem

_WITHOUT_END = ("connection",)


def recoveries(records: Iterable[AnyRecord]) -> dict[str, list[float]]:
    """Return the recovery times in seconds, by kind of fault.

    The time is measured from the end of a fault to the first good response of the node (of any node, for a fault of
    all) to a request that began after it. A response is good unless its status is 5xx. Faults without a later request
    are not counted.
    """
    faults: list[Fault] = []
    starts: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    ends: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    for record in records:
        match record:
            case Fault() if record.kind not in _WITHOUT_END:
                faults.append(record)
            case Issue() | Redeem() if record.end is not None and record.status is not None and record.status < 500:
                for node in (record.node, ""):
                    starts[node].append(record.start)
                    ends[node].append(record.end)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for node, begun in starts.items():
        order = sorted(range(len(begun)), key=begun.__getitem__)
        sorted_starts = array("d", (begun[i] for i in order))
        sorted_ends = array("d", (ends[node][i] for i in order))
        for fault in faults:
            first = bisect_left(sorted_starts, fault.end)
            # The first request is not always the first to be answered, but among the first hundred one is.
            if fault.node == node and first < len(sorted_ends):
                found[fault.kind].append(min(sorted_ends[first : first + 100]) - fault.end)
    return dict(found)


def describe(found: dict[str, list[float]]) -> str:
    """Return a readable table of the recovery times."""
    lines = [f"{'recovery':14}{'':16}{'times':>6}{'median':>9}{'longest':>9}"]
    for kind, seconds in sorted(found.items()):
        lines.append(f"{'':14}{kind:16}{len(seconds):6}{median(seconds):7.2f} s{max(seconds):7.2f} s")
    return "\n".join(lines)
