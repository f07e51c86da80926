"""Every CPU instruction set gives the same results, and every number of threads the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_fff
from cases import make_case
from tolerances import TOLERANCE, assert_close
from torch_fff import functional

pytestmark = pytest.mark.cpu

CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
TREES = {
    "fff": {"levels": 5, "leaf_width": 9, "leaf_activation": "gelu"},
    "several": {"trees": 3, "noise": True, "leaf_scale": True, "leaf_activation": "relu"},
    "neurons": {"levels": 6, "leaf_width": None, "node_activation": "gelu_tanh", "trees": 2},
    "both": {"node_output": True, "node_activation": "silu", "levels": 4},
}

# Runs in a process of its own: ATen reads ATEN_CPU_CAPABILITY once, when it is loaded.
PROGRAM = """
import sys
import torch
from cases import TreeCase
from torch_fff import functional

capability, inputs, outputs = sys.argv[1:]
assert torch.backends.cpu.get_cpu_capability() == capability
problems = torch.load(inputs)

def tree(tensors, options, grads):
    result, gradients = TreeCase(tensors, options).gradients(functional.tree, *grads)
    return [*result, *gradients.values()]

def soft(pre, logits, grad):
    mixture = functional.leaf_mixture(logits.requires_grad_())
    hidden = functional.gated_activation(pre.requires_grad_(), mixture, "gelu")
    return [mixture, hidden, *torch.autograd.grad(hidden, (pre, logits), grad)]

def pruned(tensors, grad, grad_logits, node_weight):
    wanted = [tensor.requires_grad_() for tensor in tensors]
    output = torch.ops.fff.sparse_leaves(*wanted, prune=0.25, activation="gelu")
    nodes = torch.ops.fff.sparse_linear_backward(
        grad_logits, tensors[0].detach(), node_weight, [True, True]
    )
    return [output, *torch.autograd.grad(output, wanted, grad), *nodes]

def solve(name, problem):
    function = {"soft": soft, "pruned": pruned}.get(name, tree)
    return [tensor.detach() for tensor in function(*problem)]

solved = {}
for key, problem in problems.items():
    torch.set_num_threads(2)
    two = solve(key[0], problem)
    torch.set_num_threads(1)
    solved[key] = solve(key[0], problem)
    for i, (a, b) in enumerate(zip(solved[key], two, strict=True)):
        assert torch.equal(a, b), f"{key}, tensor {i}: 1 and 2 threads differ"
torch.save(solved, outputs)
"""


def problems():
    """Inputs by name and dtype: of our own operators only, as the libraries' products promise no
    bits. Random numbers themselves depend on the instruction set.
    """
    for dtype in TOLERANCE:
        for name, options in TREES.items():
            case = make_case(
                dtype=dtype, tokens=(1500,), width=67, out=35, straight_through=True, **options
            )
            output, scores, _ = case.run(functional.tree)
            grads = [torch.randn_like(output), torch.randn_like(scores)]
            yield (name, str(dtype)), (case.tensors, case.options, grads)

        def random(*shape, dtype=dtype):
            return torch.randn(shape).to(dtype)

        # x and two trees of 32 leaves of 9 neurons; multiples of 1/8: whether a leaf stays must not
        # hang on rounding. Few enough gradients of the nodes for the sparse sums.
        mixture = torch.randint(0, 5, (1500, 2, 32)).to(dtype) / 8
        leaves = random(64, 9, 67), random(64, 9), random(64, 9, 35), random(64, 35)
        logits = random(1500, 62) * (torch.rand(1500, 62) < 0.05)
        pruned = [random(1500, 67), mixture, *leaves], random(1500, 35), logits, random(62, 67)
        yield ("pruned", str(dtype)), pruned
        yield ("soft", str(dtype)), [random(1500, width) for width in (64 * 5, 63, 64 * 5)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results under each instruction set that this CPU has."""
    folder = tmp_path_factory.mktemp("capabilities")
    torch.save(dict(problems()), folder / "inputs.pt")
    paths = [Path(torch_fff.__file__).parents[1], Path(__file__).parent]
    best = CAPABILITIES.index(torch.backends.cpu.get_cpu_capability())
    found = {}
    for capability in CAPABILITIES[: best + 1]:
        outputs = folder / f"{capability}.pt"
        environment = {
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability.lower(),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, capability, folder / "inputs.pt", outputs],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{capability}: {done.stderr}"
        found[capability] = torch.load(outputs)
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*TREES, "pruned", "soft"])
def test_same_results(results, name, dtype):
    key = (name, str(dtype))
    for capability, found in results.items():
        pairs = zip(found[key], results["DEFAULT"][key], strict=True)
        for i, (actual, expected) in enumerate(pairs):
            where = f"{capability}, tensor {i}"
            if actual.dtype == torch.int64:
                assert torch.equal(actual, expected), where
            else:
                assert_close(actual, expected, name=where)
