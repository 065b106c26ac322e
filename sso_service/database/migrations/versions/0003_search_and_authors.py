"""Member search, an index of admins, the creators of API tokens, and no session from before its user existed."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from sso_service.people import search_text

revision = "0003"
down_revision = "0002"

_AT_ONCE = 1000


def upgrade() -> None:
    op.add_column("users", sa.Column("search", sa.String(2000), server_default="", nullable=False))
    op.create_index("ix_users_search", "users", ["search"])
    is_admin = sa.text("role = 'admin'")
    op.create_index(
        "ix_memberships_admins",
        "memberships",
        ["account_id", "user_id"],
        sqlite_where=is_admin,
        postgresql_where=is_admin,
    )
    op.add_column("api_tokens", sa.Column("created_by", sa.BigInteger().with_variant(sa.Integer, "sqlite")))
    op.add_column("api_tokens", sa.Column("expiry_logged_at", sa.BigInteger()))
    # A token or session that is older than its user was for another person, who had this id in another database.
    op.execute("UPDATE users SET sessions_from = created_at WHERE sessions_from < created_at")
    _fill_search()


def _fill_search() -> None:
    # Case folding and normalisation in Python, because the databases fold case differently.
    connection = op.get_bind()
    columns: list[sa.ColumnClause[Any]] = [
        sa.column(name) for name in ("id", "email", "first_name", "last_name", "search")
    ]
    users = sa.table("users", *columns)
    last = 0
    while True:
        page = sa.select(*users.c[:4]).where(users.c.id > last).order_by(users.c.id).limit(_AT_ONCE)
        people = connection.execute(page).all()
        if not people:
            return
        connection.execute(
            sa.update(users).where(users.c.id == sa.bindparam("of")).values(search=sa.bindparam("text")),
            [{"of": id_, "text": search_text(email, first, last_name)} for id_, email, first, last_name in people],
        )
        last = people[-1][0]
