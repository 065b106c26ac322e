"""Hook of MkDocs: links to files outside the documentation.

Pages link to files of the repository, such as `../../../scripts/deploy/nginx.conf`. These links work in a checkout, but
the site does not contain the files. Here they become plain text, and a link to a missing file stops the build.
"""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's Markdown without links that leave the documentation."""
    return without_outside_links(markdown, Path(page.file.abs_src_path), Path(config.docs_dir))


def without_outside_links(markdown: str, page: Path, documentation: Path) -> str:
    """Replace each link from `page` to a file outside `documentation` by its text.

    Raises `FileNotFoundError` if the file does not exist.
    """

    def replace(link: re.Match[str]) -> str:
        target = (page.parent / link[2]).resolve()
        if target.is_relative_to(documentation.resolve()):
            return link[0]  # checked by MkDocs
        if not target.exists():
            raise FileNotFoundError(f"{page}: {link[2]} does not exist")
        return link[1]

    return _LINK.sub(replace, markdown)
