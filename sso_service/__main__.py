"""The command `sso-service`, which is also `python -m sso_service`. It needs the extra `server`."""

import sys

try:
    from sso_service.cli.main import main
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "sso_service":
        raise  # a defect of this package, not of its installation
    sys.exit(
        f"Error: The command sso-service needs the extra `server` (no module {error.name!r}): install it with "
        "pip install 'PATH[server]', where PATH is the source tree or the wheel of sso-service."
    )

if __name__ == "__main__":
    main(prog_name="sso-service")
