"""Translations of the pages: gettext catalogues whose keys are the English texts.

The texts of message pages are not here: they stand beside the error codes, in `sso_service.problems`.
"""

import gettext
from functools import cache
from importlib import resources
from io import BytesIO

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

LANGUAGES = ("en", "de")


@cache
def translations(language: str) -> gettext.NullTranslations:
    """Return the catalogue of a language. It is compiled at first use, so the repository holds only its source."""
    if language == "en":
        return gettext.NullTranslations()
    with resources.files(__package__).joinpath(f"locale/{language}.po").open("rb") as file:
        catalogue = read_po(file, locale=language)
    compiled = BytesIO()
    write_mo(compiled, catalogue)
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)
