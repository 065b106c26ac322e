"""Alembic's entry point. The connection comes from `upgrade`, in a transaction that is ours to commit."""

from alembic import context

from sso_service.database.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # Alembic opens no transaction of its own inside ours
)
context.run_migrations()
