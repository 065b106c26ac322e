"""The tables. Times are integer Unix seconds; ids are unsigned 32-bit numbers, as a token holds them in four bytes."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

SCHEMA_VERSION = "0002"
"""The Alembic revision that these tables are. A test compares it with the migrations."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the column is called INTEGER, to the letter.
_Id = BigInteger().with_variant(Integer, "sqlite")


def _fits_the_token() -> CheckConstraint:
    return CheckConstraint("id BETWEEN 1 AND 4294967295", name="id_is_unsigned_32_bit")


accounts = Table(
    "accounts",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("name", String(100), nullable=False),
    Column("portal_url", String(2000)),
    _fits_the_token(),
)

teams = Table(
    "teams",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("account_id", _Id, ForeignKey(accounts.c.id), nullable=False, index=True),
    Column("name", String(100), nullable=False),
    _fits_the_token(),
)

# Ids of users are never used again (AUTOINCREMENT; an identity that refuses to begin anew): an id that came back would
# make the old owner's tokens and sessions the new owner's.
users = Table(
    "users",
    metadata,
    Column("id", _Id, Identity(maxvalue=2**32 - 1, cycle=False), primary_key=True),
    Column("email", String(254), nullable=False, unique=True),
    Column("first_name", String(100), nullable=False),
    Column("last_name", String(100), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("disabled_at", BigInteger),
    Column("sessions_from", BigInteger, nullable=False, server_default="0"),
    _fits_the_token(),
    sqlite_autoincrement=True,
)

memberships = Table(
    "memberships",
    metadata,
    Column("user_id", _Id, ForeignKey(users.c.id), primary_key=True, autoincrement=False),
    Column("account_id", _Id, ForeignKey(accounts.c.id), primary_key=True, autoincrement=False, index=True),
    Column("role", String(20), nullable=False),
    # The time before which no session of theirs in this account counts: an account's admins have no say in others.
    Column("sessions_from", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("role IN ('editor', 'publisher', 'admin')", name="role_exists"),
    sqlite_with_rowid=False,
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", _Id, Identity(), primary_key=True),
    Column("account_id", _Id, ForeignKey(accounts.c.id), index=True),  # null: a platform API token
    Column("name", String(100), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # hex SHA-256 of the secret; revoked: "-" comes first
    Column("hint", String(20), nullable=False),
    Column("scopes", String(200), nullable=False),  # separated by spaces, as in RFC 6749
    Column("max_role", String(20)),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),  # to the hour, so that use costs one write an hour
    sqlite_autoincrement=True,
)

# Sixteen bytes per redeemed token and nothing else. The claims begin with the expiry, so that this one index serves
# uniqueness and purging, and is appended to at its right edge.
consumed_nonces = Table(
    "consumed_nonces",
    metadata,
    Column("claims", LargeBinary(16), primary_key=True),
    sqlite_with_rowid=False,
)

# One row: claims below it were purged and can never be consumed again.
consumed_floor = Table(
    "consumed_floor",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("claims", LargeBinary(16), nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)
