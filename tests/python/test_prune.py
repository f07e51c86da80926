"""Soft trees that skip light leaves: prune_mixture, fff::sparse_leaves and its backward,
fff::sparse_linear_backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from cases import make_case
from tolerances import TOLERANCE, assert_close
from torch_fff import FFF, functional, reference
from torch_fff._functorch import sparse_linear

OP = torch.ops.fff.sparse_leaves
BACKWARD = torch.ops.fff.sparse_leaves_backward
CASES = [
    {},
    *({"tokens": tokens} for tokens in [(), (0,), (1,), (300,), (2, 3, 5), (2, 0, 3)]),
    *({"width": width, "out": 70 - width} for width in [1, 3, 33, 67]),
    *({"levels": levels} for levels in [0, 1, 5]),
    {"levels": 9, "tokens": (20,), "leaf_width": 1},
    *({"leaf_width": leaf_width} for leaf_width in [1, 2, 9, 33]),
    {"trees": 3, "node_output": True, "node_activation": "gelu", "tokens": (2, 3)},
    {"tokens": (1100,), "width": 3, "out": 5, "trees": 2, "leaf_activation": "silu"},
    {"b1": False, "b2": False, "leaf_activation": "gelu"},
    {"b2": False, "levels": 4},
    {"contiguous": False},
]


def threshold(mixture, share):
    """A ``prune`` that keeps about this share of the leaves, far from the weight of any."""
    weights = [1e-9, 1.0, *mixture.flatten().tolist()]
    weights = torch.tensor(weights, dtype=torch.float64, device="cpu").sort().values
    at = min(int((1 - share) * (len(weights) - 1)), len(weights) - 2)
    around = weights[max(at - 20, 0) : at + 21].log()
    widest = around.diff().argmax()
    return around[widest : widest + 2].mean().exp().item()


def solve(function, case, prune, grads=None):
    """Outputs and the gradients of all inputs."""
    case = case.requires_grad()
    outputs = case.run(lambda **arguments: function(**arguments, prune=prune))
    pairs = zip(outputs, grads or map(torch.ones_like, outputs), strict=True)
    used = [(output, g) for output, g in pairs if output.requires_grad]
    outs, out_grads = zip(*used, strict=True)
    inputs = list(case.inputs.values())
    gradients = torch.autograd.grad(outs, inputs, out_grads, materialize_grads=True)
    return [t.detach() for t in (*outputs, *gradients)]


def arguments(dtype, tokens=(40,), trees=2, levels=4, device="cpu", **options):
    """Tensors of the op; the mixture's weights are of all sizes, 0 and ties included."""
    case = make_case(dtype=dtype, tokens=tokens, trees=trees, levels=levels, **options)
    mixture = functional.leaf_mixture(3 * torch.randn(*tokens, trees, 2**levels - 1).to(dtype))
    mixture[..., :2] = mixture[..., 1:2]
    mixture[..., 3] = 0
    tensors = (case.tensors["x"], mixture, *map(case.tensors.get, ("w1", "b1", "w2", "b2")))
    return [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]


def definition(x, mixture, w1, b1, w2, b2, prune, activation):
    kept = reference.prune_mixture(mixture, prune)
    return reference._sum_of_leaves(x, kept, w1, b1, w2, b2, None, activation)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_reference(device, dtype, options, share):
    case = make_case(dtype=dtype, device=device, **options)
    exact = case.to(torch.float64)
    prune = threshold(exact.run(reference.soft_tree).mixture, share)
    grads = [torch.randn_like(output) for output in case.run(functional.soft_tree)]
    actual = solve(functional.soft_tree, case, prune, grads)
    expected = solve(reference.soft_tree, exact, prune, [g.double() for g in grads])
    names = ("output", "node_logits", "mixture", *case.inputs)
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, name=name)


@pytest.mark.cpu
@pytest.mark.parametrize("prune", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize(
    "options", [{}, {"tokens": (1100,), "width": 33, "b2": False}, {"leaf_width": 9, "b1": False}]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_op_equals_definition(dtype, options, prune):
    given = arguments(dtype, **options)
    prune = torch.tensor(prune, dtype=dtype).item()  # as it is compared in that dtype
    output = OP(*given, prune, "silu")
    present = [t for t in given if t is not None]
    g = torch.randn_like(output)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    expected = definition(*exact, prune, "silu")
    assert_close(output, expected)
    actual = torch.autograd.grad(output, present, g)
    present = [t for t in exact if t is not None]
    for a, e in zip(actual, torch.autograd.grad(expected, present, g.double()), strict=True):
        assert a.dtype == dtype
        assert_close(a, e)


@pytest.mark.cpu
def test_both_sides_of_the_border(monkeypatch):
    """Leaf by leaf or as products over all leaves: the same."""
    case = make_case(tokens=(60,), levels=5, trees=2, node_output=True)
    mixture = case.run(functional.soft_tree).mixture
    results = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(functional, "_SPARSE_SHARE", share)
        results.append(solve(functional.soft_tree, case, threshold(mixture, 0.5)))
    for sparse, dense in zip(*results, strict=True):
        assert_close(sparse, dense)


@pytest.mark.cpu
@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_leaves_are_skipped_where_that_pays(kept):
    case = make_case(tokens=(60,), levels=5)
    prune = threshold(case.run(functional.soft_tree).mixture, kept)
    with torch.profiler.profile() as profile:
        case.run(lambda **arguments: functional.soft_tree(**arguments, prune=prune))
    assert ("fff::sparse_leaves" in {event.name for event in profile.events()}) == (kept < 0.5)


def test_zero_prunes_nothing(device):
    case = make_case(dtype=torch.float32, device=device, trees=2, node_output=True)
    plain = solve(lambda prune, **arguments: functional.soft_tree(**arguments), case, 0.0)
    for a, b in zip(solve(functional.soft_tree, case, 0.0), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prune", [1e-6, 1e-3, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
def test_error_is_bounded(prune, sharpness):
    """What is missing is less than ``prune`` times the leaves that are left out."""
    case = make_case(tokens=(100,), levels=6, trees=2)
    case.tensors["node_weight"] *= sharpness
    full = case.run(functional.soft_tree)
    output = case.run(lambda **arguments: functional.soft_tree(**arguments, prune=prune)).output
    x, w1, b1, w2, b2 = (case.tensors[name] for name in ("x", "w1", "b1", "w2", "b2"))
    hidden = (torch.einsum("ti,fli->tfl", x, w1) + b1).relu()
    leaves = torch.einsum("tfl,flo->tfo", hidden, w2) + b2
    dropped = (full.mixture < prune).flatten(1)
    bound = prune * (leaves.abs() * dropped.unsqueeze(-1)).sum(1)
    assert ((output - full.output).abs() <= bound + 1e-12).all()
    assert dropped.any() == (not torch.equal(output, full.output))


@pytest.mark.cpu
def test_the_heaviest_leaf_stays():
    mixture = torch.tensor([[0.2, 0.3, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    pruned = functional.prune_mixture(mixture, 1.0)
    assert pruned.tolist() == [[0, 0, 0.4, 0], [0.25] * 4]
    assert functional.prune_mixture(mixture, 0.2).tolist()[0] == [0.2, 0.3, 0.4, 0]
    # Each tree keeps one.
    x, w2 = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(4, 1, 4, dtype=torch.float64)
    tree = torch.stack([mixture[:, :2], mixture[:, 2:]], 1)
    w1, which = torch.zeros(4, 1, 1, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    output = OP(x, tree, w1, None, w2, which, 1.0, "relu")
    assert output.tolist() == [[0, 0.3, 0.4, 0], [0.25] * 4]


def test_one_leaf_takes_all():
    case = make_case(dtype=torch.float32, tokens=(200,), levels=5, bias_shift=1000.0)
    output = case.run(lambda **arguments: functional.soft_tree(**arguments, prune=0.01)).output
    assert_close(output, case.to(torch.float64).run(reference.tree).output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_with_its_token(dtype):
    case = make_case(dtype=dtype, tokens=(40,), levels=5)
    case.tensors["node_weight"] *= 30
    clean = solve(functional.soft_tree, case, 0.01)[0]
    case.tensors["x"][7] = math.nan
    with torch.no_grad():
        output = case.run(lambda **arguments: functional.soft_tree(**arguments, prune=0.01)).output
    assert output[7].isnan().all()
    others = torch.arange(40) != 7
    assert_close(output[others], clean[others])


def test_dropout_is_that_of_all_leaves():
    case = make_case(tokens=(50,), levels=4)
    torch.manual_seed(3)
    actual = case.run(lambda **a: functional.soft_tree(**a, prune=0.05, dropout=0.4)).output
    torch.manual_seed(3)
    scale = F.dropout(torch.ones(50, 16 * 4, dtype=torch.float64), 0.4)
    scale = scale.view(50, 1, 16, 4)
    expected = case.run(lambda **a: reference.soft_tree(**a, prune=0.05, hidden_scale=scale))
    assert_close(actual, expected.output)


@pytest.mark.cpu
def test_any_number_of_threads_gives_the_same_bits():
    given = arguments(torch.float32, tokens=(1500,), width=70, out=130)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = OP(*given, 0.02, "gelu")
        results.append([output, *torch.autograd.grad(output.square().sum(), given)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("prune", [0.05, 0.3, 1.0])
def test_gradcheck(prune):
    given = arguments(torch.float64, tokens=(2,), width=3, leaf_width=2, out=2, levels=2)
    with torch.no_grad():  # away from where a leaf comes or goes
        given[1].copy_(torch.tensor([0.4, 0.33, 0.17, 0.1]).roll(1).expand(2, 2, 4))
    assert torch.autograd.gradcheck(lambda *inputs: OP(*inputs, prune, "gelu"), given)


@pytest.mark.cpu
def test_no_double_backward():
    given = arguments(torch.float32)
    loss = OP(*given, 0.1, "gelu").square().sum()
    (gradient,) = torch.autograd.grad(loss, given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fff::sparse_leaves_backward"):
        gradient.sum().backward()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"tokens": (2, 0, 3)}, {"tokens": (), "b1": False}])
def test_opcheck(dtype, options):
    given = arguments(dtype, **options)
    torch.library.opcheck(OP.default, (*given, 0.05, "gelu"))
    constant = [None if t is None else t.detach() for t in given]
    g = torch.randn_like(OP(*constant, 0.05, "relu"))
    for mask in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(BACKWARD.default, (g, *constant, 0.05, "relu", mask))


@pytest.mark.cpu
@pytest.mark.parametrize("density", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("tokens", [(), (0,), (40,), (2, 33), (1100,)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradient_of_the_scores(dtype, tokens, density):
    """Zeros are skipped, where there are enough of them."""
    given = [torch.randn(*tokens, 33), torch.randn(70, 33), torch.randn(70)]
    given = [t.to(dtype).requires_grad_() for t in given]
    g = (torch.randn(*tokens, 70) * (torch.rand(*tokens, 70) < density)).to(dtype)
    actual = torch.autograd.grad(sparse_linear(*given), given, g)
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = torch.autograd.grad(F.linear(*exact), exact, g.double())
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e)


@pytest.mark.cpu
@pytest.mark.parametrize("density", [0.04, 1.0])
@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_scores(mask, density):
    g = torch.randn(2, 30, 15) * (torch.rand(2, 30, 15) < density)
    x, weight = torch.randn(2, 30, 7), torch.randn(15, 7)
    torch.library.opcheck(torch.ops.fff.sparse_linear_backward.default, (g, x, weight, mask))


@pytest.mark.cpu
def test_no_double_backward_of_the_scores():
    x = torch.randn(40, 7, requires_grad=True)
    weight = torch.randn(15, 7, requires_grad=True)
    loss = sparse_linear(x, weight, None).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="fff::sparse_linear_backward cannot be differentiated"):
        gradient.sum().backward()


def test_compiles_without_breaks():
    torch._dynamo.reset()
    layer = FFF(16, 4, 16, 5, prune=0.02, hardening=0.1, usage_mode="soft")
    step = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (7, 60):
        x = torch.randn(batch, 16, requires_grad=True)
        inputs = [x, *layer.parameters()]
        results = [torch.autograd.grad(f(x).sin().sum(), inputs) for f in (step, layer)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu
def test_autocast():
    case = make_case(dtype=torch.float32, tokens=(64,), levels=5, leaf_activation="gelu")
    case.tensors["node_weight"] *= 10
    case = case.requires_grad()
    with torch.autocast("cpu"):
        output = case.run(lambda **arguments: functional.soft_tree(**arguments, prune=0.01)).output
    assert output.dtype == torch.bfloat16
    for gradient in torch.autograd.grad(output.sum(), list(case.inputs.values())):
        assert gradient.dtype == torch.float32
    bf16 = case.to(torch.bfloat16)
    lower = bf16.run(lambda **arguments: functional.soft_tree(**arguments, prune=0.01)).output
    assert torch.equal(output, lower)


@pytest.mark.cpu
@pytest.mark.parametrize("batched", ["tokens", "weights"])
def test_vmap(batched):
    dims = (0, 0, None, None, None, None) if batched == "tokens" else (None, None, 0, 0, 0, 0)
    samples = [arguments(torch.float64) for _ in range(3)]
    stacked = [
        torch.stack([sample[i] for sample in samples]) if dim == 0 else samples[0][i]
        for i, dim in enumerate(dims)
    ]
    actual = vmap(lambda *a: OP(*a, 0.05, "gelu"), in_dims=dims)(*stacked)
    expected = vmap(lambda *a: definition(*a, 0.05, "gelu"), in_dims=dims)(*stacked)
    assert_close(actual, expected)


def test_per_sample_gradients():
    case = make_case(trees=2, levels=4, leaf_activation="gelu")
    x = case.tensors.pop("x")
    prune = threshold(functional.soft_tree(x, **case.tensors, **case.options).mixture, 0.4)

    def loss(function):
        return lambda w, x: function(x, **w, **case.options, prune=prune).output.square().sum()

    actual = vmap(grad(loss(functional.soft_tree)), in_dims=(None, 0))(case.tensors, x)
    expected = vmap(grad(loss(reference.soft_tree)), in_dims=(None, 0))(case.tensors, x)
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], name=name)


def test_layer():
    """Nodes, their losses and usage see the whole mixture."""
    torch.manual_seed(0)
    options = {"parallel_size": 2, "hardening": 0.5, "balance": 0.1, "usage_mode": "soft"}
    layer = FFF(16, 4, 8, 5, prune=0.03, **options)
    plain = FFF(16, 4, 8, 5, **options)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer.node_weights.mul_(20), plain.node_weights.mul_(20)
    x = torch.randn(100, 16)
    y, entropies = layer(x, return_entropies=True)
    expected, expected_entropies = plain(x, return_entropies=True)
    assert not torch.equal(y, expected)
    assert torch.equal(entropies, expected_entropies)
    assert torch.equal(layer.leaf_usage, plain.leaf_usage)
    assert torch.equal(layer.balance_loss, plain.balance_loss)
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    layer.prune = 0.0
    assert torch.equal(layer(x), expected)
    assert "prune=0.03" in repr(FFF(4, 1, 4, 1, prune=0.03))


@pytest.mark.cpu
@pytest.mark.parametrize("prune", [-0.1, 1.5, math.nan, "0.1"])
def test_refuses_a_wrong_threshold(prune):
    message = r"prune: expected a number in \[0, 1\], got"
    with pytest.raises(ValueError, match=f"FFF: {message}"):
        FFF(4, 1, 4, 1, prune=prune)
    with pytest.raises(ValueError, match=f"soft_tree: {message}"):
        make_case().run(lambda **arguments: functional.soft_tree(**arguments, prune=prune))
    if not isinstance(prune, str):
        with pytest.raises(ValueError, match=r"fff::sparse_leaves: prune must be in \[0, 1\], got"):
            OP(*arguments(torch.float32), prune, "relu")


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t.long(), "x must be float32, float64, bfloat16 or float16, got Long"),
        (1, lambda t: t[:-1], r"mixture must have shape \[..., trees, leaves\]"),
        (1, lambda t: t.double(), "mixture must be Float, got Double"),
        (2, lambda t: t[0], "w1 must have shape"),
        (2, lambda t: t[:-1], "w1 must have shape"),
        (3, lambda t: t[:, :-1], "b1 must have shape"),
        (4, lambda t: t[:, :-1], "w2 must have shape"),
        (5, lambda t: t.bfloat16(), "b2 must be Float, got BFloat16"),
    ],
)
def test_refuses_what_does_not_fit(position, change, message):
    given = [t.detach() for t in arguments(torch.float32)]
    given[position] = change(given[position])
    with pytest.raises(RuntimeError, match=f"fff::sparse_leaves: {message}"):
        OP(*given, 0.1, "relu")
