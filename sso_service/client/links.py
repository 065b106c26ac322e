"""Login links: a Studio URL with a login token in its query."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from sso_service.http import split_parameter


def check_scheme(scheme: str, host: str, name: str, *, allow_http: bool) -> None:
    """Raise `ValueError` for http, unless `allow_http` or the host is this machine. `name` is what the URL is.

    Without TLS, everyone in the network between reads the API token or the login token, and can use it.
    """
    if scheme == "http" and not allow_http and not is_loopback(host):
        raise ValueError(f"the {name} must begin with https://; allow_http=True permits http:// in a trusted network")


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an address of a URL, is this machine."""
    # Names below `localhost` resolve to loopback (RFC 6761 section 6.3).
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def split_studio_url(url: str, *, allow_http: bool = False) -> tuple[str, str]:
    """Return the parts of a Studio URL before and after the place where `sso=TOKEN` is inserted.

    Raises `ValueError` unless the URL is absolute, with https and a host, and has no parameter `sso`. It may have http
    if it leads to this machine, or if `allow_http` is true. Spaces, control characters and backslashes, which browsers
    read differently from how they are written, are refused. So is a user name before the host. With either, a person or
    a check could see another host than the one that gets the token.
    """
    if " " in url or not url.isprintable():
        raise ValueError("the Studio URL contains spaces or control characters")
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError if the port is not a number
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or "\\" in parts.netloc:
        raise ValueError("the Studio URL must be absolute, with https and a host, without a user name")
    check_scheme(parts.scheme, parts.hostname, "Studio URL", allow_http=allow_http)
    if split_parameter(parts.query.encode())[0]:
        raise ValueError("the Studio URL already has a parameter sso")
    before, sign, fragment = url.partition("#")
    separator = "?" if "?" not in before else "&" if parts.query else ""
    return before + separator, sign + fragment
