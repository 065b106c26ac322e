"""Words in German and English: gettext catalogues, whose keys are the English words."""

import gettext
from functools import cache
from importlib import resources
from io import BytesIO

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

LANGUAGES = ("en", "de")


def marked(text: str) -> str:
    """`text` itself: marks it as one that the catalogues translate, where it is defined rather than used."""
    return text


@cache
def translations(language: str) -> gettext.NullTranslations:
    """The catalogue of a language. It is compiled when it is first needed, so that only what people edit is kept."""
    if language == "en":
        return gettext.NullTranslations()
    with resources.files("sso_service").joinpath(f"locale/{language}.po").open("rb") as file:
        catalogue = read_po(file, locale=language)
    compiled = BytesIO()
    write_mo(compiled, catalogue)
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)
