"""The command line, for operators. It uses the database and the key directory; no running service is needed."""

from sso_service.cli.main import main

__all__ = ["main"]
