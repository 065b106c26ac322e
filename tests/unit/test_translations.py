"""The words: whatever a page says is there in German too, and the catalogue holds nothing that no page says."""

import re
from importlib import resources
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from sso_service.web.studio.translations import LANGUAGES, translations

PACKAGE = Path(str(resources.files("sso_service")))
# The API's documentation is for programmers, and in English as the API is.
TEMPLATES = sorted(set(PACKAGE.glob("web/templates/*.html")) - {PACKAGE / "web/templates/docs.html"})

# What is the same in every language.
NAMES = {"Studio", "UTC", "write:sso", "verify:sso"}

_PLACEHOLDER = re.compile(r"%\((\w+)\)(\w)")
_SPOKEN_ATTRIBUTE = re.compile(r"\b(?:aria-label|aria-description|alt|title|placeholder)=([\"'])(.*?)\1", re.DOTALL)


def said(directory: Path) -> dict[str | tuple[str, ...], list[str]]:
    """Every text that code and templates have translated (with its plural, if it has one), and where they stand."""
    keywords = {"marked": None, "_": None, "gettext": None, "ngettext": (1, 2)}
    method_map = [("**.py", "python"), ("**/templates/**.html", "jinja2.ext:babel_extract")]
    # `silent`: a template that cannot be read would otherwise have nothing to say.
    options = {"**/templates/**.html": {"trim_blocks": "true", "lstrip_blocks": "true", "silent": "false"}}
    found: dict[str | tuple[str, ...], list[str]] = {}
    for file, line, text, *_ in extract_from_dir(directory, method_map, options, keywords=keywords):
        found.setdefault(text if isinstance(text, str) else tuple(text), []).append(f"{file}:{line}")
    return found


def catalogue(language: str) -> Catalog:
    with PACKAGE.joinpath("locale", f"{language}.po").open("rb") as file:
        return read_po(file, locale=language, abort_invalid=True)


def messages(language: str) -> list[Message]:
    return [message for message in catalogue(language) if message.id]


def forms(text: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """The text, or its singular and plural."""
    return (text or "",) if isinstance(text, str | None) else tuple(text)


def untranslated(template: str) -> set[str]:
    """The words of a template that are written into it, and so are the same in every language."""
    text = re.sub(r"{#.*?#}|{%-?\s*trans\b.*?endtrans\s*-?%}|<style>.*?</style>", " ", template, flags=re.DOTALL)
    spoken = [value for _, value in _SPOKEN_ATTRIBUTE.findall(text)]
    text = re.sub(r"{{.*?}}|{%.*?%}", " ", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>|&\w+;", " ", text)
    spoken = [re.sub(r"{{.*?}}|{%.*?%}", " ", value, flags=re.DOTALL) for value in spoken]
    return {word for word in " ".join([text, *spoken]).split() if re.search(r"[^\W\d_]", word)}


@pytest.fixture(params=[language for language in LANGUAGES if language != "en"])
def language(request: pytest.FixtureRequest) -> str:
    """Each language that has a catalogue."""
    name: str = request.param
    return name


def test_every_text_of_every_page_is_in_the_catalogue_and_nothing_else_is(language: str) -> None:
    texts = said(PACKAGE)
    assert len(texts) > 100, "they were found at all"
    known = {forms(message.id) for message in messages(language)}
    assert {text: where for text, where in texts.items() if forms(text) not in known} == {}, "missing"
    assert known - {forms(text) for text in texts} == set(), "unused"


def test_every_text_of_the_catalogue_is_translated(language: str) -> None:
    plurals = catalogue(language).num_plurals
    for message in messages(language):
        assert not message.fuzzy, message.id
        translated = forms(message.string)
        assert len(translated) == (plurals if message.pluralizable else 1), message.id
        for text in translated:
            assert text.strip(), message.id
            assert text == text.strip()
    assert list(catalogue(language).obsolete) == []


def test_no_text_is_in_the_catalogue_twice(language: str) -> None:
    lines = PACKAGE.joinpath("locale", f"{language}.po").read_text("utf-8")
    ids = re.findall(r'^msgid ((?:".*"\n?)+)', lines, re.MULTILINE)
    assert len(ids) == len(set(ids))


def test_a_translation_has_the_placeholders_of_its_text_and_no_other(language: str) -> None:
    seen = set()
    for message in messages(language):
        expected = set(_PLACEHOLDER.findall(forms(message.id)[-1]))
        for text in (*forms(message.id), *forms(message.string)):
            assert set(_PLACEHOLDER.findall(text)) == expected, message.id
            # Every text is formatted, so a per cent sign that begins no placeholder would be an error on the page.
            assert "%" not in _PLACEHOLDER.sub("", text).replace("%%", ""), text
        seen |= expected
    assert ("name", "s") in seen


def test_a_template_has_no_words_but_those_that_are_translated() -> None:
    assert len(TEMPLATES) > 5
    for template in TEMPLATES:
        assert untranslated(template.read_text("utf-8")) <= NAMES, template.name


def test_words_that_a_template_does_not_translate_are_found() -> None:
    template = (
        '<p title="A {{ _("b") }}">{{ _("c") }} &nbsp; D{% if e %} F{% endif %}</p>{% trans %}g{% endtrans %} - 1'
    )
    assert untranslated(template) == {"A", "D", "F"}


def test_a_text_that_is_new_in_code_or_templates_is_found(tmp_path: Path) -> None:
    (tmp_path / "web/templates").mkdir(parents=True)
    (tmp_path / "web/pages.py").write_text('X = marked(\n    "One "\n    "two"\n)\n')
    (tmp_path / "web/templates/new.html").write_text(
        '{% block a %}{{ {"x": _("Three")}[y] }}{% endblock %}{% trans count=n %}a{% pluralize %}b{% endtrans %}'
    )
    assert set(said(tmp_path)) == {"One two", "Three", ("a", "b")}


def test_the_catalogue_is_what_pages_use(language: str) -> None:
    used = translations(language)
    for message in messages(language):
        if message.pluralizable:
            one, many = forms(message.id)
            assert (used.ngettext(one, many, 1), used.ngettext(one, many, 2)) == forms(message.string)
        else:
            assert used.gettext(str(message.id)) == message.string
    assert translations("en").gettext("Members") == "Members"
