"""Widths and sizes as a person reads them."""

from collections.abc import Mapping
from typing import Any


def bits_name(bits: Any) -> str:
    """Return '2 bits', '1 bit' or 'ternary'."""
    if bits == "ternary":
        return "ternary"
    return f"{bits} bit{'' if bits == 1 else 's'}"


def weights_name(settings: Mapping[str, Any]) -> str:
    """Return '2 bits', or 'mixed bits' with overrides that give other bits."""
    bits = settings["bits"]
    others = {str(given).rpartition("=")[2] for given in settings.get("bits_override") or ()}
    return "mixed bits" if others - {str(bits)} else bits_name(bits)


def width_name(settings: Mapping[str, Any]) -> str:
    """Return '2 bits', 'mixed bits' with overrides, '2 bits, inputs 4 bits' with rounded inputs."""
    weights = weights_name(settings)
    inputs = settings.get("act_bits", "none")
    return weights if inputs == "none" else f"{weights}, inputs {bits_name(inputs)}"


def size_text(count: int) -> str:
    """Return a number of bytes as a person reads it."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
