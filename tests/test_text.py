"""Texts of strangers: what a terminal or a page would obey comes out as its number."""

import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from askewq.text import fence, markdown, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.conv", "layer1.0.conv"),
        ("größe 漢字", "größe 漢字"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("100 %\rERROR", r"100 %\rERROR"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x9b31m", r"\x9b31m"),
        ("safe\u202etxt.exe", r"safe\u202etxt.exe"),
        ("a\u2028b", r"a\u2028b"),
        ("\ud800", r"\ud800"),
        ("a\u3164\u2800\u115fb", r"a\u3164\u2800\u115fb"),
    ],
)
def test_printable(text, shown):
    """Control and format characters are written as numbers, letters of any script stay."""
    assert printable(text) == shown


def test_a_message_keeps_its_lines():
    """Line breaks and tabs of our own messages stay; everything else is still replaced."""
    assert printable("one\n\ttwo\r\x1b", lines=True) == "one\n\ttwo\\r\\x1b"


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text):
    """Whatever comes in, what goes out is printable and can be written as UTF-8."""
    shown = printable(text)
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in shown)
    assert not {chr(i) for i in [*range(32), *range(127, 160)]} & set(shown)
    shown.encode()


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("<script>alert(1)</script>", r"&lt;script&gt;alert\(1\)&lt;/script&gt;"),
        ("[x](javascript:y)", r"\[x\]\(javascript:y\)"),
        ("a|b", r"a\|b"),
        ("![i](http://x)", r"\!\[i\]\(http\://x\)"),
        ("www.x.org a@x.org a:b", r"www\.x.org a\@x.org a:b"),
        ("`code` *b* _i_ #h", r"\`code\` \*b\* \_i\_ \#h"),
        ("a\n\n# b", r"a\\n\\n\# b"),
        ("&lt;", "&amp;lt;"),
    ],
)
def test_markdown(text, page):
    """Markup and HTML are shown, not obeyed; a line break does not end the line."""
    assert markdown(text) == page


@given(st.text())
def test_markdown_leaves_no_tag_and_no_line(text):
    """No text opens a tag, an entity or a line of its own."""
    page = markdown(text)
    assert not {"<", ">", "\n"} & set(page)
    assert "&" not in page.replace("&lt;", "").replace("&gt;", "").replace("&amp;", "")
    assert html.unescape(page) == page.replace("&lt;", "<").replace("&gt;", ">").replace(
        "&amp;", "&"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: b", "```"), ("x `y`", "```"), ("```\n", "````"), ("`" * 9, "`" * 10)],
)
def test_fence(content, expected):
    """The fence of a block is longer than any run of backticks within it."""
    assert fence(content) == expected
