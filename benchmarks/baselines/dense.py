"""Dense layers as torch gives them: eager and compiled; and without matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..case import FORWARD, TRAINING, Case
from ..check import assert_close
from ..layers import Layer, activation


class Dense(nn.Module):
    """Linear, activation, Linear; an output bias where the tree has one."""

    def __init__(self, case: Case, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        dtype = case.torch_dtype
        biased = case.leaf_width > 0
        self.first = nn.Linear(case.input_width, width, dtype=dtype)
        self.activation = activation(case)
        self.second = nn.Linear(width, case.output_width, bias=biased, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.activation(self.first(x)))
        return output


def dense_bytes(case: Case, width: int) -> int:
    """Weights and hidden activations; in training also their gradients."""
    weights = width * (case.input_width + case.output_width)
    hidden = 2 * case.tokens * width
    return (weights + hidden) * case.itemsize * (2 if case.step == TRAINING else 1)


def eager(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return Dense(case, case.equal_width)


def narrow_eager(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return Dense(case, case.visited)


def compiled(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    """max-autotune, and for inference freezing, which lays the weights out for the kernels.

    On a GPU every contender runs in a CUDA graph of the benchmark's own.
    """
    from torch._inductor import config  # slow to import

    module = Dense(case, case.equal_width)
    mode = "max-autotune" if case.device == "cpu" else "max-autotune-no-cudagraphs"
    fast: nn.Module = torch.compile(module, dynamic=False, mode=mode)  # type: ignore
    training = case.step == TRAINING
    # Dynamo, too, must see that weights will be frozen: as an option of torch.compile it is late.
    with config.patch(freezing=not training, autotune_num_choices_displayed=0):
        if not training:
            with torch.inference_mode():
                assert_close("dense-compiled", fast(x), module(x))
            return fast
        # With a gradient for x, as the step will have it: otherwise it would be compiled twice.
        output = fast(x.detach().requires_grad_())
        assert_close("dense-compiled", output, module(x))
        output.sum().backward()
    return fast


class FusedDense(nn.Module):
    """Bias and activation in the epilogue of the first product, of which GELU is the tanh form."""

    def __init__(self, layer: Dense) -> None:
        super().__init__()
        self.first, self.second = layer.first, layer.second
        self.gelu = isinstance(layer.activation, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first
        hidden = torch._addmm_activation(first.bias, x, first.weight.t(), use_gelu=self.gelu)
        output: Tensor = self.second(hidden)
        return output


def fused(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    module = Dense(case, case.equal_width)
    fast = FusedDense(module)
    if fast.gelu:
        module.activation = nn.GELU(approximate="tanh")
    with torch.inference_mode():
        assert_close("dense-cublaslt", fast(x), module(x))
    return fast


def fused_unfit(case: Case) -> str:
    if case.device == "cpu":
        return "cuBLASLt is for GPUs"
    return "" if case.step == FORWARD else "the fused product has no backward"


class VectorDense(nn.Module):
    """The dense layer by multiplying and adding vectors only (level 1 of BLAS), one token."""

    def __init__(self, layer: Dense) -> None:
        super().__init__()
        self.w1, self.b1 = layer.first.weight, layer.first.bias
        self.activation = layer.activation
        self.w2 = layer.second.weight.detach().T.contiguous()  # a neuron's output is a row

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.activation((self.w1 * x).sum(1) + self.b1)
        return (self.w2 * hidden.unsqueeze(1)).sum(0, keepdim=True)


def vectors(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    module = Dense(case, case.equal_width)
    slow = VectorDense(module)
    with torch.inference_mode():
        assert_close("dense-vectors", slow(x), module(x))
    return slow


def vectors_unfit(case: Case) -> str:
    fits = case.tokens == 1 and case.step == FORWARD and not case.leaf_width
    fits = fits and case.device == "cpu"
    return "" if fits else "written for the forward of one token on a CPU"
