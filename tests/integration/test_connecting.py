"""Connections of the pool that the server closes before they are used."""

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError

from sso_service.database.transactions import Database
from sso_service.errors import Unavailable


def test_a_database_that_closes_every_connection_is_unavailable(database: Database) -> None:
    @event.listens_for(database.engine, "checkout")
    def find_it_closed(*_: object) -> None:
        raise DisconnectionError

    with pytest.raises(Unavailable, match="cannot connect"), database.connect():
        pass
