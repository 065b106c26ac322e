"""Run `sso-service` as `python -m sso_service`."""

from sso_service.cli import main

main(prog_name="sso-service")
