"""Memberships: an index for the list of an account's members, and the time before which their sessions are ended."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_memberships_account_id", "memberships", ["account_id"])
    op.add_column("memberships", sa.Column("sessions_from", sa.BigInteger, server_default="0", nullable=False))
