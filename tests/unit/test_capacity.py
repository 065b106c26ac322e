"""How many connections a worker accepts, and how it reports those that it refuses."""

import resource

import pytest

from sso_service.server import capacity, descriptors


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit of descriptors, as the system would keep them."""
    limits = [1024, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.__setitem__(slice(None), values))
    monkeypatch.setattr(capacity, "CAPACITY", capacity.Capacity())
    return limits


@pytest.mark.parametrize(
    ("hard", "setting", "accepted"),
    [(1 << 30, 4096, 4096), (20_000, 4096, 4096), (4096, 4096, 3276), (1024, 4096, 819), (1024, 100, 100), (64, 10, 1)],
)
def test_connections_take_at_most_four_fifths_of_the_descriptors(
    limits: list[int], hard: int, setting: int, accepted: int
) -> None:
    limits[1] = hard
    capacity.limit_connections(setting)
    assert accepted == capacity.CAPACITY.limit
    assert limits == [hard, hard]


@pytest.mark.parametrize("number", [64, 128, 256, 1024, 4096, 65_536])
def test_a_burst_of_connections_leaves_descriptors_for_other_work(number: int) -> None:
    connections = descriptors.for_connections(number)
    assert connections == 1 or number - connections - descriptors.backlog(number) >= 64


def test_an_infinite_limit_that_cannot_be_set_is_none(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    limits[:] = [256, resource.RLIM_INFINITY]
    assert descriptors.raise_limit() == 256
    limits[:] = [resource.RLIM_INFINITY] * 2
    capacity.limit_connections(4096)
    assert capacity.CAPACITY.limit == 4096


def test_refused_connections_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    full = capacity.Capacity()
    full.limit = 7
    for now in (100.0, 100.0, 159.0, 160.0, 161.0):
        full.refuse(now=now)
    assert caplog.messages == [f"Refused {number} connections above the limit of 7" for number in (1, 3)]
