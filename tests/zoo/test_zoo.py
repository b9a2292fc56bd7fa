"""Every model of the zoo: all of them with `-m zoo`, a fast sample otherwise."""

import re
from pathlib import Path

import pytest
from journey import ZOO, travel

FAST = [
    "timm mobilenetv3_small_050",
    "timm test_nfnet",
    "timm beit_base_patch16_224",
    "transformers albert",
    "transformers gpt2",
    "transformers t5",
    "transformers mixtral",
    "transformers gpt-oss",
    "transformers detr",
    "transformers wav2vec2",
    "transformers mamba",
]
# Layers that transform their weights, and whose use of them only the whole model knows.
FLOAT = {
    "StdConv2d": "transforms its weight before use",
    "StdConv2dSame": "transforms its weight before use",
    "ScaledStdConv2d": "transforms its weight before use",
    "ParametrizationList": "a weight computed from other parameters",
    "OPTLearnedPositionalEmbedding": "cannot be seen by a call",
    "Llama4Router": "cannot be seen by a call",
}


def check(name: str) -> None:
    """Compare a model's journey with what is promised."""
    journey = travel(ZOO[name])
    assert journey.failures == ()
    assert journey.quantized > 0
    missing = sum(size for _, _, size, _ in journey.exceptions)
    assert journey.quantized + missing == journey.coverable
    for layer, kind, _, note in journey.exceptions:
        assert note.endswith(FLOAT[kind]), layer


every = pytest.mark.filterwarnings("ignore")


@every
@pytest.mark.parametrize("name", FAST)
def test_a_sample(name: str):
    """Wrapped, trained, snapped, packed and reloaded: equal to the bit; what is float is named."""
    check(name)


@pytest.mark.zoo
@every
@pytest.mark.parametrize("name", sorted(ZOO.keys() - set(FAST)))
def test_all(name: str):
    """The same for the rest of the zoo."""
    check(name)


def test_the_page_lists_the_zoo():
    """docs/coverage.md has a row for every model, and says how many there are."""
    page = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text()
    assert {*re.findall(r"^\| ((?:timm|transformers) [^|]+) \|", page, re.M)} == ZOO.keys()
    assert f"What becomes of {len(ZOO)} models" in page
