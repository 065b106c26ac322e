"""The document as an HTML page."""

import html
import re
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sso_service.web.openapi.components import Json
from sso_service.web.studio.pages import style_source

_ENVIRONMENT = Environment(
    loader=PackageLoader("sso_service.web", "openapi"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(content: Json) -> tuple[str, str]:
    """Return the OpenAPI document `content` as HTML, and the Content-Security-Policy to send with it.

    The page loads nothing and runs nothing. It contains its style, and the policy allows exactly this style by its
    digest (CSP level 3, section 2.3.1). So even an error in the escaping could not add another style.
    """
    style = files("sso_service.web.openapi").joinpath("docs.css").read_text("utf-8")
    policy = f"default-src 'none'; style-src {style_source(style)}; base-uri 'none'; form-action 'none'; "
    rendered = _ENVIRONMENT.get_template("docs.html").render(
        api=_resolve(content, content),
        style=style,
        markdown=_markdown,
        phrase=lambda status: HTTPStatus(int(status)).phrase,
    )
    return rendered, policy + "frame-ancestors 'none'"


def _resolve(value: Any, content: Json) -> Any:
    """Return `value` with every reference into `content` replaced by its target."""
    match value:
        case {"$ref": str(reference), **others}:
            target: Any = content
            for name in reference.removeprefix("#/").split("/"):
                target = target[name]
            return _resolve({**target, **others}, content)
        case dict():
            return {name: _resolve(each, content) for name, each in value.items()}
        case list():
            return [_resolve(each, content) for each in value]
    return value


def _markdown(text: str) -> str:
    """Return HTML for the Markdown that the document uses: paragraphs, lists, and code between backticks."""
    blocks = []
    for block in text.split("\n\n"):
        marked = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(block))
        items = marked.removeprefix("- ").split("\n- ")
        blocks.append("".join(f"<li>{item}</li>" for item in items) if block.startswith("- ") else f"<p>{marked}</p>")
    return "".join(f"<ul>{block}</ul>" if block.startswith("<li>") else block for block in blocks)
