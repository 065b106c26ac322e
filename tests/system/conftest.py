"""Fixtures of the system tests: a deployment behind each proxy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployments import Deployment, running_deployment
from tests.support.programs import program
from tests.support.proxies import PROXIES


@pytest.fixture(scope="module", params=PROXIES)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a proxy that is installed."""
    kind: str = request.param
    program(kind)
    return kind


@pytest.fixture(scope="module")
def module_deployment(
    kind: str, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """A deployment that the tests of a module share."""
    with running_deployment(kind, sqlite_template, tmp_path_factory.mktemp(kind)) as (deployment, _):
        yield deployment


@pytest.fixture
def deployment(module_deployment: Deployment) -> Deployment:
    """The shared deployment, whose Studio has no recorded requests."""
    module_deployment.studio.take()
    return module_deployment
