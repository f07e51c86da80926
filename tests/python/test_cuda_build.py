"""A build with CUDA, checked without a GPU: what the dispatcher has, and fakes of GPU tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cases import make_case
from test_opcheck import TREES
from torch_fff import _C, FFF, UltraFFF, functional

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(_C.cuda_version is None, reason="needs a build with CUDA"),
]

OPS = torch.ops.fff
WITH_KERNELS = {
    "descend",
    "gated_activation",
    "gated_activation_backward",
    "leaf_mixture",
    "leaf_mixture_backward",
    "tree",
    "tree_backward",
}
# Ops that a layer or a function never calls for tensors of a GPU, and what it does instead.
ONLY_FOR_CPU = {
    "linear": "F.linear",
    "linear_backward": "F.linear",
    "sparse_leaves": "all leaves are computed",
    "sparse_leaves_backward": "all leaves are computed",
    "sparse_linear_backward": "F.linear",
    "tree_backward_rows": "an error of backward with row_sparse_grad=True",
}


def ops():
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fff::") for name in names if name.startswith("fff::")}


def has(op, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fff::{op}", key)


def test_every_op_is_known():
    assert ops() == WITH_KERNELS | ONLY_FOR_CPU.keys()


@pytest.mark.parametrize("op", sorted(WITH_KERNELS | ONLY_FOR_CPU.keys()))
def test_gpu_has_the_keys_that_the_cpu_has(op):
    """Those without a kernel are registered too, to say so."""
    assert has(op, "CUDA")
    for of_cpu, of_gpu in (("AutocastCPU", "AutocastCUDA"), ("AutogradCPU", "AutogradCUDA")):
        assert has(op, of_cpu) == has(op, of_gpu)


class CalledOps(TorchDispatchMode):
    """Names of our ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fff":
            self.names.add(func._schema.name.removeprefix("fff::"))
        return func(*args, **(kwargs or {}))


EVERYTHING = {
    "dropout": 0.1,
    "region_leak": 0.1,
    "noise": 0.5,
    "alternates": 1,
    "min_slope": 0.1,
    "prune": 0.01,
    "hardening": 0.1,
    "balance": 0.1,
    "usage_mode": "hard",
    "node_output": True,
    "master_leaf_width": 3,
    "parallel_size": 2,
}
SOFT, HARD = {"leaf_mixture", "gated_activation"}, {"tree"}
LAYERS = {
    "FFF": (lambda **o: FFF(16, 4, 8, 3, **o), SOFT),
    "FFF with everything": (lambda **o: FFF(16, 4, 8, 3, **EVERYTHING, **o), SOFT),
    "hard FFF": (lambda **o: FFF(16, 4, 8, 3, train_hardened=True, **o), HARD),
    "hard FFF with everything": (
        lambda **o: FFF(16, 4, 8, 3, train_hardened=True, **EVERYTHING, **o),
        HARD,
    ),
    "UltraFFF": (lambda **o: UltraFFF(16, 8, 3, 2, **o), HARD),
    "shallow UltraFFF": (lambda **o: UltraFFF(400, 8, 0, 300, **o), HARD),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_reach_the_ops_with_kernels_alone(name, dtype):
    build, expected = LAYERS[name]
    with FakeTensorMode():
        with torch.device("cuda"):
            layer = build(dtype=dtype)
            x = torch.randn(64, layer.input_width, dtype=dtype)
        with CalledOps() as called:
            y = layer(x)
        assert y.device.type == "cuda"
        assert expected <= called.names <= WITH_KERNELS
        with CalledOps() as called, torch.inference_mode():
            layer.eval()(x)
        assert called.names == {"tree"}


def on_gpu(arguments):
    """Fakes, with the strides of the originals, in the place of tensors."""
    return [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
        if isinstance(t, torch.Tensor)
        else t
        for t in arguments
    ]


def assert_fakes(op, arguments):
    """The fake of a GPU's result is the CPU's in all but the device; the CPU's result."""
    result = op(*arguments)
    with FakeTensorMode():
        fakes = op(*on_gpu(arguments))
    single = isinstance(result, torch.Tensor)
    for real, fake in [(result, fakes)] if single else zip(result, fakes, strict=True):
        assert isinstance(fake, FakeTensor)
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", TREES, ids=str)
def test_fakes_of_trees(options, dtype):
    arguments = make_case(dtype=dtype, **options).arguments()
    output, scores, leaf = assert_fakes(OPS.tree, arguments)
    routes = (output, scores, scores, leaf)
    for mask in ([True, True, True], [False, True, False]):
        assert_fakes(OPS.tree_backward, (*routes, *arguments[:-1], mask))
    x, node_weight, node_bias, noise, *rest = (arguments[i] for i in (0, 1, 2, 8, 11, 12))
    assert_fakes(OPS.descend, (x, node_weight, node_bias, noise, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (5,), (2, 3)])
def test_fakes_of_soft_trees(tokens, dtype):
    logits = torch.randn(*tokens, 7).to(dtype)
    mixture = assert_fakes(OPS.leaf_mixture, (logits,))
    assert_fakes(OPS.leaf_mixture_backward, (mixture, logits, mixture))
    pre = torch.randn(*tokens, 24).to(dtype)
    hidden = assert_fakes(OPS.gated_activation, (pre, mixture, "gelu"))
    assert_fakes(OPS.gated_activation_backward, (hidden, pre, mixture, "gelu"))


def test_functions_reach_the_ops_with_kernels_alone():
    case = make_case(dtype=torch.float32, node_output=True, trees=2, levels=5)
    names = ("x", "node_weight", "node_bias", "node_output", "w1", "b1", "w2", "b2")
    with FakeTensorMode(), torch.no_grad(), CalledOps() as called:
        tensors = dict(zip(names, on_gpu(case.arguments()[:8]), strict=True))
        functional.soft_tree(**tensors, trees=2, prune=0.1)
        functional.descend(*(tensors[name] for name in names[:3]), trees=2)
    assert called.names == {"leaf_mixture", "gated_activation", "descend"}
