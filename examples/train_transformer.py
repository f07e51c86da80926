"""Trains small language models that differ in their feedforward blocks only, and compares them.

    python examples/train_transformer.py [--steps N] [--text FOLDER] [--seed S] [--output FOLDER]

Leaves a table (transformer.md, transformer.json) and loss curves (transformer.png) in the output
folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import text
from language_model import LanguageModel
from loss_figure import draw_losses
from report import table
from schedule import warm_cosine
from torch_fff import replace_feedforward

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 3, 128, 16
WIDE, NARROW = 1024, 32  # neurons of the trees in training, and of their paths in inference
LEARNING_RATE, ROUND = 2e-3, 50  # steps of one model before it is the next one's turn
VALIDATION_WINDOWS = 64


@dataclass
class Contender:
    """neurons, neurons_all: that a token visits in a block, and that the block has."""

    name: str
    model: nn.Module
    neurons: int
    neurons_all: int
    losses: list[float] = field(default_factory=list)  # validation, after each round
    seconds: list[float] = field(default_factory=list)  # of training, up to then
    inference: float = math.inf  # seconds of a batch

    def seconds_to(self, loss: float) -> float | None:
        """Of training until the validation loss came down to ``loss``, between rounds linearly."""
        points = zip(self.losses, self.seconds, strict=True)
        for (before, begin), (after, end) in pairwise(points):
            if after <= loss:
                share = (before - loss) / (before - after) if before > loss else 0.0
                return begin + share * (end - begin)
        return None


def main() -> None:
    arguments = parse_arguments()
    output = Path(os.path.relpath(arguments.output))
    output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    data = text.load(arguments.text)
    print(f"{data.name}: {len(data.training):,} bytes, {len(data.validation):,} for validation")
    contenders = all_contenders(arguments.seed)
    train_in_turns(contenders, data, arguments.steps, arguments.seed)
    time_inference(contenders, data)

    worst = max(contender.losses[-1] for contender in contenders)
    results = results_table(contenders, worst)
    print(f"\n{results}\n")
    (output / "transformer.md").write_text(results + "\n")
    settings = {
        "data": data.name,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (output / "transformer.json").write_text(as_json(settings, contenders))
    draw_losses(data.name, ROUND, contenders, output / "transformer.png")
    print(f"Done in {time.perf_counter() - begin:.0f} s. In {output}: transformer.md, .json, .png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="for each model (default 1000)")
    parser.add_argument("--text", type=Path, help="folder of text; default: Python's own sources")
    parser.add_argument("--seed", type=int, default=0)
    default = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=default, help="default examples/output")
    return parser.parse_args()


def all_contenders(seed: int) -> list[Contender]:
    """Dense blocks of the trees' training width and of their inference width, and trees.

    Every model starts from the same other weights.
    """

    def model(neurons: int) -> nn.Module:
        torch.manual_seed(seed)
        return LanguageModel(WIDTH, HEADS, LAYERS, LENGTH, neurons)

    ultra, fff = model(NARROW), model(NARROW)
    replace_feedforward(ultra, "ultra", depth=7, parallel_size=4)
    options = {"train_hardened": True, "activation": "gelu"}
    replace_feedforward(fff, "fff", depth=6, leaf_width=8, parallel_size=2, **options)
    return [
        Contender(f"dense {WIDE}", model(WIDE), WIDE, WIDE),
        Contender(f"dense {NARROW}", model(NARROW), NARROW, NARROW),
        Contender("UltraFFF 4x7", ultra, 4 * 8, 4 * 255),
        Contender("FFF 2x l=8 d=6", fff, 2 * (6 + 8), 2 * (63 + 64 * 8)),
    ]


def train_in_turns(contenders: list[Contender], data: text.Text, steps: int, seed: int) -> None:
    """One training loop for all, on the same batches.

    They take turns, so that what else the machine does slows all of them.
    """
    steps -= steps % ROUND
    optimizers = {
        contender.name: torch.optim.AdamW(
            contender.model.parameters(), LEARNING_RATE, weight_decay=0.01
        )
        for contender in contenders
    }
    for contender in contenders:
        contender.losses.append(validation_loss(contender.model, data))
        contender.seconds.append(0.0)
    with tqdm(total=steps * len(contenders), unit="step", ncols=100) as progress:
        for first in range(0, steps, ROUND):
            batches = [
                text.windows(data.training, BATCH, LENGTH, seed * steps + step)
                for step in range(first, first + ROUND)
            ]
            for contender in contenders:
                optimizer = optimizers[contender.name]
                begin = time.perf_counter()
                for step, (x, target) in enumerate(batches, first):
                    optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm_cosine(step, steps)
                    logits = contender.model(x)
                    loss = cross_entropy(logits.flatten(0, 1), target.flatten())
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(contender.model.parameters(), 1.0)
                    optimizer.step()
                contender.seconds.append(contender.seconds[-1] + time.perf_counter() - begin)
                contender.losses.append(validation_loss(contender.model, data))
                progress.update(ROUND)
            progress.set_postfix_str(" ".join(f"{c.losses[-1]:.3f}" for c in contenders))


@torch.inference_mode()
def validation_loss(model: nn.Module, data: text.Text) -> float:
    """Mean over the same windows every time, nats a byte; routing is hard."""
    x, target = text.windows(data.validation, VALIDATION_WINDOWS, LENGTH, seed=0)
    model.eval()
    loss = cross_entropy(model(x).flatten(0, 1), target.flatten()).item()
    model.train()
    return loss


@torch.inference_mode()
def time_inference(contenders: list[Contender], data: text.Text) -> None:
    """The fastest of some batches each, in turns."""
    for seed in range(20):
        x, _ = text.windows(data.validation, BATCH, LENGTH, seed)
        for contender in contenders:
            contender.model.eval()
            begin = time.perf_counter()
            contender.model(x)
            seconds = time.perf_counter() - begin
            contender.inference = min(contender.inference, seconds)


def results_table(contenders: list[Contender], loss: float) -> str:
    tokens = BATCH * LENGTH
    header = ("feedforward blocks", "neurons a token", "validation loss", "training, s")
    rows = []
    for contender in contenders:
        reached = contender.seconds_to(loss)
        row = (
            contender.name,
            f"{contender.neurons} of {contender.neurons_all}",
            f"{contender.losses[-1]:.3f}",
            f"{contender.seconds[-1]:.1f}",
            "" if reached is None else f"{reached:.1f}",
            f"{1e3 * contender.inference:.1f}",
        )
        rows.append(row)
    return table((*header, f"to {loss:.3f}, s", f"inference of {tokens}, ms"), rows)


def as_json(settings: dict[str, object], contenders: list[Contender]) -> str:
    names = ("name", "neurons", "neurons_all", "losses", "seconds", "inference")
    record = [{name: getattr(contender, name) for name in names} for contender in contenders]
    return json.dumps({**settings, "round": ROUND, "results": record}, indent=1) + "\n"


if __name__ == "__main__":
    main()
