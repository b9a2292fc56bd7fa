"""Names and texts of strangers, made harmless for the place that they are shown in.

Model names, layer names and labels come from files that anybody may have written. A terminal obeys
control characters, a page obeys Markdown and HTML.
"""

import html
import re
import unicodedata

# The last three are in addresses, which a page makes links of.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$]|:(?=//)|(?<=www)\.|@)")
# Letters of Hangul and of Braille that are blank.
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text with every character that a terminal would obey written as its number.

    That is what starts an escape sequence, ends or overwrites a line, runs text backwards, or has
    no shape at all.

    Args:
        text: of any origin.
        lines: keep line breaks and tabs, for a message of several lines.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        character
        if character in kept
        or (character.isprintable() and character not in _BLANK)
        or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def markdown(text: str) -> str:
    """Return a text that a Markdown page shows as it is: no markup, no HTML, one line."""
    return _MARKDOWN.sub(r"\\\1", html.escape(printable(text), quote=False))


def fence(content: str) -> str:
    """Return a fence of backticks, longer than any within the content, for a block of code."""
    longest = max(map(len, re.findall(r"`+", content)), default=0)
    return "`" * max(3, longest + 1)
