"""Makes what the C++ programs run: a small model, and what it computes for one input.

python export_model.py FOLDER writes to FOLDER

- model.pt2: the model compiled by AOTInductor, for any batch size
- weights.pt: its weights, for the same model written with LibTorch
- example.pt: an input and the model's output
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_fff import FFF, UltraFFF

WIDTH = 64


class Model(nn.Module):
    """Two residual feedforward blocks over [batch, WIDTH]; train_model.cpp has the same in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fff = FFF(WIDTH, 8, WIDTH, depth=4)
        self.ultra = UltraFFF(WIDTH, WIDTH, depth=5, parallel_size=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fff(self.norm(x))
        return x + self.ultra(x)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(32, WIDTH)
    with torch.no_grad():
        torch.save({"input": x, "output": model(x)}, folder / "example.pt")
        torch.save(dict(model.state_dict()), folder / "weights.pt")  # a plain dict, for C++
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=65536)}}
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        package = str(folder / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
