"""Write docs/coverage.md: what becomes of every model of the zoo.

    python tests/zoo/table.py

About a quarter of an hour on one core; nothing is downloaded.
"""

import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
import transformers
from journey import STEPS, TWO_BITS_UP_TO, ZOO, Journey, travel

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEAD = """# Coverage

What becomes of {count} models, small and with random weights, in torch {torch}, timm {timm} and
transformers {transformers}. `python tests/zoo/table.py` writes this page, and
`python -m pytest -m zoo` checks the same. Each model is wrapped with `include=["*"]` (at 2 bits,
above {two_bits:,} parameters at 1), makes {steps} training steps, is snapped, packed, and reloaded
into a plain network. **ok** says that

- wrapping leaves all outputs as they were, to the bit;
- the training steps have finite losses, and move weights;
- the reloaded network gives the snapped one's outputs, to the bit, and the packed network those of
  the reloaded one, both frozen.

*covered* is the share of the weights of all layers that askewq knows (Linear, Conv, ConvTranspose,
Embedding, GPT-2's Conv1D, MultiheadAttention, transformers' stacked experts, their subclasses)
which are on a grid. What is missing from 100 % stays float for the reason beside it, which is the
one that `askewq inspect` gives. *also float* are the classes of other modules with matrices:
position tables, routers, recurrent layers.

| model | parameters | bits | covered | | what stays float, and why | also float |
|---|---:|---:|---:|---|---|---|
"""


def row(name: str, journey: Journey) -> str:
    """Return the line of a model."""
    reasons = Counter((kind, note) for _, kind, _, note in journey.exceptions)
    first = {(kind, note): layer for layer, kind, _, note in reversed(journey.exceptions)}
    float_layers = "; ".join(
        f"{count} {kind} (such as `{first[kind, note]}`): {note}"
        for (kind, note), count in reasons.items()
    )
    share = f"{100 * journey.quantized / max(1, journey.coverable):.1f} %"
    result = "; ".join(journey.failures) or "ok"
    cells = (name, f"{journey.parameters:,}", str(journey.bits), share, result, float_layers)
    return f"| {' | '.join(cells)} | {', '.join(journey.others)} |"


def main() -> None:
    """Travel with every model, and write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for name, member in ZOO.items():
        rows.append(row(name, travel(member)))
        print(rows[-1], flush=True)
    head = HEAD.format(
        count=len(rows),
        torch=torch.__version__.split("+")[0],
        timm=timm.__version__,
        transformers=transformers.__version__,
        two_bits=TWO_BITS_UP_TO,
        steps=STEPS,
    )
    PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
