"""The tables. Times are integer Unix seconds. Ids are unsigned 32-bit numbers, the size that a token has room for."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    literal_column,
)

SCHEMA_VERSION = "0003"
"""The Alembic revision of these tables. A test compares it with the migrations."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows only if the column's type is spelled INTEGER.
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

# Ids of users are never reused (AUTOINCREMENT; an identity that does not cycle): a reused id would give the tokens and
# sessions of one user to another.
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
    # `people.search_text`: what member search searches and sorts by, without a function of the database.
    Column("search", String(2000), nullable=False, server_default="", index=True),
    _fits_the_token(),
    sqlite_autoincrement=True,
)

memberships = Table(
    "memberships",
    metadata,
    Column("user_id", _Id, ForeignKey(users.c.id), primary_key=True, autoincrement=False),
    Column("account_id", _Id, ForeignKey(accounts.c.id), primary_key=True, autoincrement=False, index=True),
    Column("role", String(20), nullable=False),
    # Sessions in this account from before this time are not valid. Other accounts are not affected.
    Column("sessions_from", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("role IN ('editor', 'publisher', 'admin')", name="role_exists"),
    sqlite_with_rowid=False,
)
IS_ADMIN = memberships.c.role == literal_column("'admin'")
"""The condition of the index of admins. The databases use that index only for a query with exactly this text."""
# Whether an account keeps an admin is checked within a transaction for which logins wait. Without the index, the time
# would grow with the number of members, and an account's admin could repeat it as often as they like.
Index(
    "ix_memberships_admins",
    memberships.c.account_id,
    memberships.c.user_id,
    sqlite_where=IS_ADMIN,
    postgresql_where=IS_ADMIN,
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", _Id, Identity(), primary_key=True),
    Column("account_id", _Id, ForeignKey(accounts.c.id), index=True),  # null: a platform API token
    Column("name", String(100), nullable=False),
    # The hex SHA-256 of the secret. Once revoked, it begins with "-".
    Column("digest", String(64), nullable=False, unique=True),
    Column("hint", String(20), nullable=False),
    Column("scopes", String(200), nullable=False),  # separated by spaces, as in RFC 6749
    Column("max_role", String(20)),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),  # rounded to the hour, so that use costs one write an hour
    Column("created_by", _Id),  # the id of the admin; null: an operator on the command line
    Column("expiry_logged_at", BigInteger),  # so that all nodes together log once a day that it expires soon
    sqlite_autoincrement=True,
)

# 16 bytes per consumed token and nothing else. The claims begin with the expiry, so this one index serves uniqueness
# and purging, and grows at its right edge.
consumed_nonces = Table(
    "consumed_nonces",
    metadata,
    Column("claims", LargeBinary(16), primary_key=True),
    sqlite_with_rowid=False,
)

# One row, the floor: claims below it were purged and can never be consumed.
consumed_floor = Table(
    "consumed_floor",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("claims", LargeBinary(16), nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)
