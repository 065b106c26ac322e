"""Login links: a Studio URL with a login token in its query."""

from urllib.parse import urlsplit

from sso_service.http import split_parameter


def split_studio_url(url: str) -> tuple[str, str]:
    """Return the parts of a Studio URL before and after the place where `sso=TOKEN` is inserted.

    Raises `ValueError` unless the URL is absolute, with http or https and a host, and has no parameter `sso`. Spaces,
    control characters and backslashes, which browsers read differently from how they are written, are refused. So is a
    user name before the host. With either, a person or a check could see another host than the one that gets the token.
    """
    if " " in url or not url.isprintable():
        raise ValueError("the Studio URL contains spaces or control characters")
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError if the port is not a number
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or "\\" in parts.netloc:
        raise ValueError("the Studio URL must be absolute, with http or https and a host, without a user name")
    if split_parameter(parts.query.encode())[0]:
        raise ValueError("the Studio URL already has a parameter sso")
    before, sign, fragment = url.partition("#")
    separator = "?" if "?" not in before else "&" if parts.query else ""
    return before + separator, sign + fragment
