"""Texts of the pages: complete in English and German, with the same placeholders, and none that is not used."""

import re
from importlib import resources
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from sso_service.problems import ENTRIES, Entry
from sso_service.web.studio.translations import LANGUAGES, translations

STUDIO = Path(str(resources.files("sso_service.web.studio")))
TEMPLATES = sorted(STUDIO.glob("templates/*.html"))

# Words that are the same in every language.
NAMES = {"Studio", "UTC", "write:sso", "verify:sso"}

_PLACEHOLDER = re.compile(r"%\((\w+)\)(\w)")
_SPOKEN_ATTRIBUTE = re.compile(r"\b(?:aria-label|aria-description|alt|title|placeholder)=([\"'])(.*?)\1", re.DOTALL)


def texts_of_templates(directory: Path) -> dict[str | tuple[str, ...], list[str]]:
    """Return every text that templates translate, with its plural if it has one, and its places."""
    keywords = {"_": None, "gettext": None, "ngettext": (1, 2)}
    method_map = [("templates/**.html", "jinja2.ext:babel_extract")]
    # Without `silent: false`, the texts of a template that cannot be parsed would be missing.
    options = {"templates/**.html": {"trim_blocks": "true", "lstrip_blocks": "true", "silent": "false"}}
    found: dict[str | tuple[str, ...], list[str]] = {}
    for file, line, text, *_ in extract_from_dir(directory, method_map, options, keywords=keywords):
        found.setdefault(text if isinstance(text, str) else tuple(text), []).append(f"{file}:{line}")
    return found


def catalogue(language: str) -> Catalog:
    with STUDIO.joinpath("locale", f"{language}.po").open("rb") as file:
        return read_po(file, locale=language, abort_invalid=True)


def messages(language: str) -> list[Message]:
    return [message for message in catalogue(language) if message.id]


def forms(text: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the text, or its singular and plural."""
    return (text or "",) if isinstance(text, str | None) else tuple(text)


def placeholders(text: str) -> set[tuple[str, str]]:
    """Return name and type of each placeholder.

    Fails if the text contains another per cent sign: every text is formatted, so that would be an error on the page.
    """
    assert "%" not in _PLACEHOLDER.sub("", text).replace("%%", ""), text
    return set(_PLACEHOLDER.findall(text))


def untranslated(template: str) -> set[str]:
    """Return the words of a template that are not translated."""
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


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_the_catalogue_holds_exactly_the_texts_of_the_templates(language: str) -> None:
    texts = texts_of_templates(STUDIO)
    assert len(texts) > 70, "the extraction found too little"
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
    lines = STUDIO.joinpath("locale", f"{language}.po").read_text("utf-8")
    ids = re.findall(r'^msgid ((?:".*"\n?)+)', lines, re.MULTILINE)
    assert len(ids) == len(set(ids))


def test_a_translation_has_the_same_placeholders_as_its_text(language: str) -> None:
    seen = set()
    for message in messages(language):
        expected = placeholders(forms(message.id)[-1])
        for text in (*forms(message.id), *forms(message.string)):
            assert placeholders(text) == expected, message.id
        seen |= expected
    assert ("name", "s") in seen


def test_pages_use_the_catalogue(language: str) -> None:
    used = translations(language)
    for message in messages(language):
        if message.pluralizable:
            one, many = forms(message.id)
            assert (used.ngettext(one, many, 1), used.ngettext(one, many, 2)) == forms(message.string)
        else:
            assert used.gettext(str(message.id)) == message.string
    assert translations("en").gettext("Members") == "Members"


# --- templates -------------------------------------------------------------------------------------------------------


def test_templates_contain_no_untranslated_words() -> None:
    assert len(TEMPLATES) > 5
    for template in TEMPLATES:
        assert untranslated(template.read_text("utf-8")) <= NAMES, template.name


def test_the_check_for_untranslated_words_finds_them() -> None:
    template = (
        '<p title="A {{ _("b") }}">{{ _("c") }} &nbsp; D{% if e %} F{% endif %}</p>{% trans %}g{% endtrans %} - 1'
    )
    assert untranslated(template) == {"A", "D", "F"}


def test_the_extraction_finds_new_texts_of_templates(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/new.html").write_text(
        '{% block a %}{{ {"x": _("Three")}[y] }}{% endblock %}{% trans count=n %}a{% pluralize %}b{% endtrans %}'
    )
    assert set(texts_of_templates(tmp_path)) == {"Three", ("a", "b")}


# --- message pages ---------------------------------------------------------------------------------------------------

PAGES = {code: entry for code, entry in ENTRIES.items() if entry.title or entry.text}


@pytest.mark.parametrize("entry", PAGES.values(), ids=PAGES)
def test_a_message_page_has_title_and_text_in_both_languages(entry: Entry) -> None:
    assert 200 <= entry.page_status < 600
    for text in (entry.title, entry.text):
        assert text is not None
        for version in (text.en, text.de):
            assert version.strip()
            assert version == version.strip()
        assert text.en != text.de
        assert (text.in_language("en"), text.in_language("de")) == (text.en, text.de)


@pytest.mark.parametrize("code", PAGES)
def test_a_message_page_has_the_same_placeholders_in_both_languages(code: str) -> None:
    title, text = PAGES[code].title, PAGES[code].text
    assert title is not None
    assert text is not None
    assert placeholders(title.en) == placeholders(title.de) == set()
    # Only the question whether to switch users has a placeholder: its page alone is given a value.
    expected = {("current", "s")} if code == "switch" else set()
    assert placeholders(text.en) == placeholders(text.de) == expected
