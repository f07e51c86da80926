"""Gradients that hold only the rows of visited nodes and leaves."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import WEIGHTS, make_case
from test_tree import CASES, label
from tolerances import assert_close
from torch_fff import FFF, UltraFFF, functional
from torch_fff._routing import visited_nodes
from torch_fff.optim import LocalAdam, LocalSGD

pytestmark = pytest.mark.cpu

OF_NODES = ("node_weight", "node_bias", "node_output")


def run_both(case, g, g_scores):
    """Dense gradients, row-sparse ones, and the leaves."""
    case.options["row_sparse_grad"] = False
    _, dense = case.gradients(functional.tree, g, g_scores)
    case.options["row_sparse_grad"] = True
    result, sparse = case.gradients(functional.tree, g, g_scores)
    return dense, sparse, result.leaf


@pytest.mark.parametrize("straight_through", [False, True], ids=["plain", "straight-through"])
@pytest.mark.parametrize("options", CASES, ids=label)
def test_equals_the_dense_gradient(options, straight_through):
    """In every dtype; shallow forests form the dense one by other products."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = make_case(dtype=dtype, **options, straight_through=straight_through)
        output, scores, _ = case.run(functional.tree)
        g, g_scores = torch.randn_like(output), torch.randn_like(scores)
        dense, sparse, leaf = run_both(case, g, g_scores)
        levels = scores.shape[-1]
        is_leaf = "w1" in case.tensors
        nodes = visited_nodes(leaf * (1 if is_leaf else 2), levels).unique()
        leaves = (leaf + torch.arange(leaf.shape[-1]) * 2**levels).unique()
        assert_close(sparse.pop("x"), dense["x"])
        for name, gradient in sparse.items():
            assert gradient.layout == torch.sparse_coo
            assert gradient.is_coalesced()
            assert (gradient.sparse_dim(), gradient.dtype) == (1, dtype)
            visited = nodes if name in OF_NODES else leaves
            assert torch.equal(gradient.indices(), visited.unsqueeze(0))
            assert_close(gradient.to_dense(), dense[name], name=name)


def test_costs_nothing_for_rows_that_are_not_visited():
    """2^40 nodes, rows of width 0."""
    levels = 40
    nodes = 2**levels - 1
    weight = torch.empty(nodes, 0).requires_grad_()
    output = torch.empty(nodes, 0).requires_grad_()
    noise = torch.randn(5, 1, levels)
    options = {"straight_through": True, "row_sparse_grad": True}
    result = functional.tree(torch.empty(5, 0), weight, None, output, noise=noise, **options)
    gradients = torch.autograd.grad(result.scores.sum(), [weight, output])
    visited = visited_nodes(2 * result.leaf, levels).unique()
    assert len(visited) > 5 * 30
    for gradient in gradients:
        assert torch.equal(gradient.indices(), visited.unsqueeze(0))


LAYERS = {
    "FFF": lambda **options: FFF(6, 2, 4, 4, train_hardened=True, parallel_size=2, **options),
    "UltraFFF": lambda **options: UltraFFF(
        6, 4, 4, 2, routing_gradient="straight_through", **options
    ),
}


@pytest.fixture(params=LAYERS)
def twins(request):
    """A layer with dense gradients and its copy with row-sparse ones."""
    dense = LAYERS[request.param](dtype=torch.float64)
    sparse = copy.deepcopy(dense)
    sparse.row_sparse_grad = True
    return dense, sparse


def tokens(count=5):
    return torch.randn(count, 6, dtype=torch.float64)


def assert_same_gradients(dense, sparse):
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert q.grad.is_sparse, name
        torch.testing.assert_close(q.grad.to_dense(), p.grad, rtol=1e-12, atol=1e-14)


def test_constructor_argument(twins):
    assert not twins[0].row_sparse_grad
    assert "row_sparse_grad=True" in repr(twins[1])
    name = type(twins[0]).__name__
    assert LAYERS[name](row_sparse_grad=True).row_sparse_grad


def step(layer, optimizer, x):
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_training_is_that_with_dense_gradients(twins, optimizer):
    start = copy.deepcopy(twins[0].state_dict())
    optimizers = [optimizer(layer.parameters(), lr=0.05) for layer in twins]
    for _ in range(5):
        x = tokens()
        for layer, own in zip(twins, optimizers, strict=True):
            step(layer, own, x)
    dense, sparse = (layer.state_dict() for layer in twins)
    assert not torch.equal(dense["node_weights"], start["node_weights"])
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)


def test_training_with_sparse_adam(twins):
    """The first step is Adam's own; later ones move visited rows alone."""
    dense, sparse = twins
    options = {"lr": 0.05, "eps": 1e-30}  # which the two use in different places
    optimizer = torch.optim.SparseAdam(sparse.parameters(), **options)
    x = tokens()
    step(dense, torch.optim.Adam(dense.parameters(), **options), x)
    step(sparse, optimizer, x)
    torch.testing.assert_close(sparse.state_dict(), dense.state_dict(), rtol=1e-12, atol=1e-14)
    for _ in range(3):
        before = copy.deepcopy(sparse.state_dict())
        step(sparse, optimizer, tokens(2))
        for name, p in sparse.named_parameters():
            moved = (p != before[name]).reshape(len(p), -1).any(-1).nonzero().flatten()
            visited = p.grad.coalesce().indices().flatten()
            assert 0 < len(moved) <= len(visited) < len(p)
            assert torch.isin(moved, visited).all()


def test_gradients_accumulate(twins):
    """Over calls within a graph, over backward passes, and over layers that share parameters."""
    inputs = [tokens(), tokens(), tokens()]
    for layer in twins:
        (layer(inputs[0]).square() + layer(inputs[1]).square()).sum().backward()
        layer(inputs[2]).square().sum().backward()
        other = copy.deepcopy(layer)
        other.node_weights = layer.node_weights
        other(inputs[0]).square().sum().backward()
    assert_same_gradients(*twins)


def test_adds_to_a_dense_gradient(twins):
    """Another use of a parameter, such as the hardening loss, makes its gradient dense."""
    x = tokens()
    for layer in twins:
        (layer(x).square().sum() + layer.node_weights.square().sum()).backward()
    dense, sparse = twins
    assert not sparse.node_weights.grad.is_sparse
    torch.testing.assert_close(sparse.node_weights.grad, dense.node_weights.grad)


def test_checkpointing(twins):
    x = tokens()
    twins[0](x).square().sum().backward()
    checkpoint(twins[1], x, use_reentrant=False).square().sum().backward()
    assert_same_gradients(*twins)


def test_frozen_parameters_get_none(twins):
    dense, sparse = twins
    sparse.node_weights.requires_grad_(False)
    x = tokens().requires_grad_()
    sparse(x).square().sum().backward()
    expected = x.grad.clone()
    dense(x).square().sum().backward()
    assert sparse.node_weights.grad is None
    torch.testing.assert_close(x.grad - expected, expected)
    torch.testing.assert_close(sparse.node_biases.grad.to_dense(), dense.node_biases.grad)


def test_refuses_casts_of_all_rows():
    layer, x = LAYERS["FFF"](row_sparse_grad=True), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"fff::tree: row_sparse_grad .* autocast.*Float"):
            layer(x)
        with torch.no_grad():
            layer(x)
        layer.bfloat16()(x).sum().backward()
    assert layer.w1.grad.is_sparse


def test_soft_forwards_have_dense_gradients():
    layer = FFF(6, 2, 4, 2, row_sparse_grad=True)
    layer(torch.randn(5, 6)).sum().backward()
    assert not layer.w1.grad.is_sparse


def test_no_double_backward(twins):
    layer = twins[1]
    (gradient,) = torch.autograd.grad(layer(tokens()).sum(), layer.node_weights, create_graph=True)
    with pytest.raises(RuntimeError, match="fff::tree_backward_rows"):
        gradient.to_dense().sum().backward()


def test_refuses_torch_func():
    case = make_case(row_sparse_grad=True)
    weights = {name: case.tensors[name] for name in WEIGHTS if name in case.tensors}
    message = r"tree: row_sparse_grad: expected False under a torch.func transform, got True"
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda w: functional.tree(case.tensors["x"], **w, **case.options)[0].sum())(
            weights
        )


@pytest.mark.parametrize("optimizer", [LocalSGD, LocalAdam])
def test_local_optimizers_refuse_it(twins, optimizer):
    layer = twins[1]
    name = optimizer.__name__
    with pytest.raises(ValueError, match=f"{name}: params: expected dense gradients, got .*sparse"):
        step(layer, optimizer(layer.parameters(), lr=0.1), tokens())


def test_compiled_training_runs_the_layer_in_eager_mode(twins):
    torch._dynamo.reset()
    dense, sparse = twins
    x = tokens()
    dense(x).square().sum().backward()
    torch.compile(sparse, backend="aot_eager")(x).square().sum().backward()
    assert_same_gradients(dense, sparse)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"row_sparse_grad: expected False under torch\.compile"):
        torch.compile(sparse, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("through", ["inference", "export"])
def test_compiles_without_gradients(twins, through):
    torch._dynamo.reset()
    layer, x = twins[1].eval(), tokens()
    if through == "export":
        compiled = torch.export.export(layer, (x,)).module()
    else:
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()
