"""torch.library.opcheck: schema, autograd registration, fakes, and tracing with dynamic shapes."""

import pytest
import torch

from cases import make_case

OPS = torch.ops.fff
TREES = [
    {},
    {"tokens": (2, 3), "trees": 2, "noise": True, "leaf_scale": True, "straight_through": True},
    {"tokens": (0,), "node_output": True, "node_activation": "gelu"},
    {"levels": 0, "node_bias": False, "b1": False, "b2": False, "leaf_activation": "silu"},
    {"leaf_width": None, "trees": 2, "tie_right": False, "slope": 2.0},
    {"leaf_width": None, "levels": 1, "contiguous": False, "tokens": ()},
    {"straight_through": True, "alternates": True, "min_slope": 0.5},
]


def tensors(device, dtype, *shapes):
    return tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 0, 3), (0,), (4, 0)], ids=str)
def test_leaf_mixture(device, dtype, shape):
    (logits,) = tensors(device, dtype, shape)
    torch.library.opcheck(OPS.leaf_mixture.default, (logits,))
    mixture = OPS.leaf_mixture(logits.detach())
    arguments = (torch.randn_like(mixture), logits.detach(), mixture)
    torch.library.opcheck(OPS.leaf_mixture_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("pre", "mixture"), [((5, 12), (5, 4)), ((2, 0, 3), (2, 0, 1)), ((6,), (6,))]
)
def test_gated_activation(device, dtype, pre, mixture):
    pre, mixture = tensors(device, dtype, pre, mixture)
    torch.library.opcheck(OPS.gated_activation.default, (pre, mixture, "gelu"))
    arguments = (torch.randn_like(pre), pre.detach(), mixture.detach(), "relu")
    torch.library.opcheck(OPS.gated_activation_backward.default, arguments)


@pytest.mark.cpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "out"), [(5, 4), (64, 512), (0, 4), (5, 1)])
def test_linear(tokens, out, transposed):
    x, weight, bias = tensors("cpu", torch.float32, (tokens, 96), (out, 96), (out,))
    if transposed:
        weight = weight.detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(OPS.linear.default, (x, weight, bias))
    torch.library.opcheck(OPS.linear.default, (x, weight, None))
    arguments = (torch.randn(tokens, out), x.detach(), weight.detach())
    for mask in [(True, True, True), (False, True, False)]:
        torch.library.opcheck(OPS.linear_backward.default, (*arguments, mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", TREES, ids=str)
def test_descend(device, dtype, options):
    case = make_case(dtype=dtype, device=device, **options)
    arguments = case.arguments()
    x, node_weight, node_bias, noise = (arguments[i] for i in (0, 1, 2, 8))
    torch.library.opcheck(
        OPS.descend.default, (x, node_weight, node_bias, noise, *arguments[11:13])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", TREES, ids=str)
def test_tree(device, dtype, options):
    case = make_case(dtype=dtype, device=device, **options)
    torch.library.opcheck(OPS.tree.default, case.requires_grad().arguments())


@pytest.mark.cpu
@pytest.mark.parametrize("options", TREES, ids=str)
def test_tree_backward_rows(options):
    case = make_case(dtype=torch.bfloat16, **options)
    output, scores, leaf = OPS.tree(*case.arguments())
    g, g_scores = torch.randn_like(output), torch.randn_like(scores)
    arguments = (g, g_scores, scores, leaf, *case.backward_arguments(), (True, True, True))
    torch.library.opcheck(OPS.tree_backward_rows.default, arguments)


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("options", TREES, ids=str)
def test_tree_backward(device, options, mask):
    case = make_case(dtype=torch.float32, device=device, **options)
    output, scores, leaf = OPS.tree(*case.arguments())
    arguments = (scores, leaf, *case.backward_arguments(), mask)
    for grads in [
        (torch.randn_like(output), torch.randn_like(scores)),
        (torch.randn_like(output), None),
    ]:
        torch.library.opcheck(OPS.tree_backward.default, (*grads, *arguments))
