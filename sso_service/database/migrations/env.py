"""Alembic's entry point. The connection comes from `upgrade`, in a transaction that `upgrade` commits."""

from alembic import context

from sso_service.database.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # no transaction of Alembic's inside that one
)
context.run_migrations()
