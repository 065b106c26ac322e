"""The members of an account are listed, so they are found by it."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_memberships_account_id", "memberships", ["account_id"])
