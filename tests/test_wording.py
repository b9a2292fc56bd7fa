"""Widths and sizes in words."""

import pytest

from askewq import wording


@pytest.mark.parametrize(
    ("bits", "name"), [(1, "1 bit"), (2, "2 bits"), (8, "8 bits"), ("ternary", "ternary")]
)
def test_bits_name(bits, name):
    """One bit is singular, ternary has no number."""
    assert wording.bits_name(bits) == name


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bits": 2}, "2 bits"),
        ({"bits": "ternary", "act_bits": 4}, "ternary, inputs 4 bits"),
        ({"bits": 4, "bits_override": ["a=2"], "act_bits": "none"}, "mixed bits"),
        ({"bits": 2, "bits_override": ["a=2"]}, "2 bits"),
        ({"bits": 1, "bits_override": ["a=ternary"]}, "mixed bits"),
        ({"bits": "ternary", "bits_override": ["a=ternary", "b=8"]}, "mixed bits"),
    ],
)
def test_width_name(settings, name):
    """What a card is titled: no width of which half of the layers have another."""
    assert wording.width_name(settings) == name


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (99_999, "100.0 kB"), (100_000, "0.10 MB"), (45_678_901, "45.68 MB")],
)
def test_size_text(count, text):
    """Thousands and millions of bytes, not of 1,024."""
    assert wording.size_text(count) == text
