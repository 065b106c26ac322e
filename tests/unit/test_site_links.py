"""The documentation site replaces links to files outside it by text."""

from pathlib import Path

import pytest

from scripts.tools.site_links import without_outside_links


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "how-to").mkdir(parents=True)
    (tmp_path / "nginx.conf").touch()
    return tmp_path / "docs" / "how-to" / "proxy.md"


def test_a_link_out_of_the_documentation_becomes_text(page: Path) -> None:
    text = "Copy [`nginx.conf`](../../nginx.conf#L3), see [keys](../explanation/keys.md)."
    expected = "Copy `nginx.conf`, see [keys](../explanation/keys.md)."
    assert without_outside_links(text, page, page.parents[1]) == expected


def test_a_link_to_a_missing_file_stops_the_build(page: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        without_outside_links("[x](../../missing.conf)", page, page.parents[1])
