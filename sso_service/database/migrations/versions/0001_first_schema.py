"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _fits_the_token(table: str) -> sa.CheckConstraint:
    return sa.CheckConstraint("id BETWEEN 1 AND 4294967295", name=op.f(f"ck_{table}_id_is_unsigned_32_bit"))


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", _Id, autoincrement=False, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("portal_url", sa.String(2000)),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
        _fits_the_token("accounts"),
    )
    op.create_table(
        "teams",
        sa.Column("id", _Id, autoincrement=False, nullable=False),
        sa.Column("account_id", _Id, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_teams"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_teams_account_id"),
        _fits_the_token("teams"),
    )
    op.create_index("ix_teams_account_id", "teams", ["account_id"])
    op.create_table(
        "users",
        sa.Column("id", _Id, sa.Identity(maxvalue=2**32 - 1, cycle=False), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("first_name", sa.String(100), nullable=False),
        sa.Column("last_name", sa.String(100), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("disabled_at", sa.BigInteger),
        sa.Column("sessions_from", sa.BigInteger, server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("email", name="uq_users_email"),
        _fits_the_token("users"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "memberships",
        sa.Column("user_id", _Id, autoincrement=False, nullable=False),
        sa.Column("account_id", _Id, autoincrement=False, nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "account_id", name="pk_memberships"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_memberships_user_id"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_memberships_account_id"),
        sa.CheckConstraint("role IN ('editor', 'publisher', 'admin')", name=op.f("ck_memberships_role_exists")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "api_tokens",
        sa.Column("id", _Id, sa.Identity(), nullable=False),
        sa.Column("account_id", _Id),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("hint", sa.String(20), nullable=False),
        sa.Column("scopes", sa.String(200), nullable=False),
        sa.Column("max_role", sa.String(20)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("last_used_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_api_tokens"),
        sa.UniqueConstraint("digest", name="uq_api_tokens_digest"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_api_tokens_account_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_api_tokens_account_id", "api_tokens", ["account_id"])
    op.create_table(
        "consumed_nonces",
        sa.Column("claims", sa.LargeBinary(16), nullable=False),
        sa.PrimaryKeyConstraint("claims", name="pk_consumed_nonces"),
        sqlite_with_rowid=False,
    )
    floor = op.create_table(
        "consumed_floor",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("claims", sa.LargeBinary(16), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_consumed_floor"),
        sa.CheckConstraint("id = 1", name=op.f("ck_consumed_floor_one_row")),
    )
    op.bulk_insert(floor, [{"id": 1, "claims": bytes(16)}])
