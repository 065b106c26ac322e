"""`python -m sso_service` is `sso-service`."""

from sso_service.cli import main

main(prog_name="sso-service")
