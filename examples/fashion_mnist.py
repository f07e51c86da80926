"""Trains fast feedforward layers and the dense layers they replace on real images, and compares.

    python examples/fashion_mnist.py [--epochs N] [--seed S] [--output FOLDER]

Leaves tables (results.md, results.json), two pictures (results.png, tree.png) and a trained layer
(fff.pt) in the output folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import data
from contenders import Contender, all_contenders
from inspection import mean_entropy
from report import Result, as_json, results_table, timing_table
from results_figure import draw_results
from timing import Block, Timing, can_compile, time_block
from torch_fff import FFF, UltraFFF, diagnostics
from training import accuracy, published, straight_through, train
from tree_figure import draw_tree


def main() -> None:
    arguments = parse_arguments()
    output = Path(os.path.relpath(arguments.output))
    output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    images = data.load()
    torch.manual_seed(arguments.seed)
    contenders = all_contenders(images.side**2, len(images.classes))
    train_all(contenders, images, arguments.epochs, arguments.seed)
    results = [measure(contender, images.test) for contender in contenders]

    print("\nTiming hard inference (medians of alternating turns):")
    blocks = [trained_block(contenders, images), large_block()]
    timings = time_all(blocks)

    tables = "\n\n".join([results_table(results), *(timing_table(b, timings) for b in blocks)])
    print(f"\n{tables}\n")
    settings = {
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (output / "results.md").write_text(tables + "\n")
    (output / "results.json").write_text(as_json(images.name, settings, results, timings))
    draw_results(images.name, results, blocks, timings, output / "results.png")
    layer = next(c.layer for c in contenders if c.objective is straight_through)
    draw_tree(layer, images, output / "tree.png")
    torch.save(layer.state_dict(), output / "fff.pt")

    print(f"Done in {time.perf_counter() - begin:.0f} s. In {output}:")
    print("  results.md, results.json  what was measured")
    print("  results.png               accuracy and speed")
    print("  tree.png                  what each node and leaf of the FFF stands for")
    print("  fff.pt                    the trained FFF; these lines load and use it:\n")
    prove(usage(layer, output / "fff.pt"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="for each layer (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    default = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=default, help="default examples/output")
    return parser.parse_args()


def train_all(contenders: list[Contender], images: data.Images, epochs: int, seed: int) -> None:
    print(f"\nTraining {len(contenders)} layers for {epochs} epochs each:")
    threads = torch.get_num_threads()
    # Steps this small gain little from threads, and lose much when one has to wait.
    torch.set_num_threads(1)
    for contender in contenders:
        torch.manual_seed(seed)
        train(contender.name, contender.layer, contender.objective, images, epochs)
    torch.set_num_threads(threads)


def measure(contender: Contender, test: data.Split) -> Result:
    layer = contender.layer
    soft = entropy = used = available = None
    if isinstance(layer, FFF | UltraFFF):
        soft = accuracy(lambda x: diagnostics.soft_output(layer, x), test)
        entropy = mean_entropy(layer, test.pixels)
        use = layer.report(test.pixels, soft=False)
        used, available = use.leaves_used, use.leaves
    return Result(
        name=contender.name,
        hard=accuracy(layer, test),
        soft=soft,
        entropy=entropy,
        leaves_used=used,
        leaves=available,
        neurons=contender.neurons,
        neurons_all=contender.neurons_all,
        parameters=contender.parameters,
        parameters_all=contender.parameters_all,
    )


def trained_block(contenders: list[Contender], images: data.Images) -> Block:
    """All but the FFF as published, whose hard inference is that of the other FFF."""
    layers = {c.name: c.layer for c in contenders if c.objective is not published}
    name = f"{images.side**2} -> {len(images.classes)}"
    return Block(name, images.side**2, layers, baseline=contenders[0].name)


def large_block() -> Block:
    """The size of a transformer's feedforward block, where conditional execution pays."""
    layers: dict[str, nn.Module] = {
        f"dense {width}": nn.Sequential(nn.Linear(768, width), nn.GELU(), nn.Linear(width, 768))
        for width in (4095, 12)
    }
    layers["FFF l=8 d=9"] = FFF(768, 8, 768, 9, activation=nn.GELU())
    layers["UltraFFF 1x11"] = UltraFFF(768, 768, 11)
    return Block("768 -> 768", 768, layers, baseline="dense 4095")


def time_all(blocks: list[Block]) -> list[Timing]:
    modes = ("eager", "compiled") if can_compile() else ("eager",)
    return [timing for block in blocks for mode in modes for timing in time_block(block, mode)]


def usage(layer: FFF, checkpoint: Path) -> str:
    leaf_width, width_in = layer.w1.shape[1:]
    shape = f"{width_in}, {leaf_width}, {layer.w2.shape[2]}, {layer.depth}"
    return (
        "import torch, torch_fff\n"
        f'layer = torch_fff.FFF({shape}); layer.load_state_dict(torch.load("{checkpoint}"))\n'
        f"print(layer.eval()(torch.randn(3, {width_in})).argmax(1))"
    )


def prove(code: str) -> None:
    """Shows the code and runs it in a fresh interpreter."""
    print(code)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"These lines failed in a fresh interpreter:\n{run.stderr}")
    print(f"\nA fresh interpreter ran them and printed: {run.stdout.strip()}")


if __name__ == "__main__":
    main()
