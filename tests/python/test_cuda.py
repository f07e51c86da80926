"""What only a GPU shows: graphs, streams, a second device, sizes beyond 32 bits, refusals.

The other tests run on a GPU as well.
"""

import copy

import pytest
import torch

from cases import make_case
from tolerances import assert_close
from torch_fff import FFF, UltraFFF, functional

pytestmark = pytest.mark.gpu

WIDTH = 96
LAYERS = {
    "soft FFF": lambda: FFF(WIDTH, 8, 40, 5, hardening=0.1),
    "hard FFF": lambda: FFF(WIDTH, 8, 40, 5, train_hardened=True, parallel_size=2),
    "UltraFFF": lambda: UltraFFF(WIDTH, 40, 7, 3, routing_gradient="straight_through"),
    "shallow UltraFFF": lambda: UltraFFF(WIDTH, 40, 4, 16, routing_gradient="straight_through"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_size = pytest.mark.parametrize("tokens", [1, 7, 300, 5000])


def training_step(layer, x, g):
    """Gradients of x and of the parameters, from none."""
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    layer(x).backward(g)
    return [leaf.grad for leaf in (x, *layer.parameters())]


def recorded(call):
    """A graph of ``call`` and its result, into which a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@each_size
@each_layer
def test_graph_of_a_forward(name, tokens):
    layer = LAYERS[name]().eval()
    x = torch.randn(tokens, WIDTH)
    with torch.inference_mode():
        graph, y = recorded(lambda: layer(x))
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert_close(y, layer(x))


@each_size
@each_layer
def test_graph_of_a_training_step(name, tokens):
    layer = LAYERS[name]()
    eager = copy.deepcopy(layer)
    x, g = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, 40)
    graph, gradients = recorded(lambda: training_step(layer, x, g))
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        g.normal_()
        graph.replay()
        expected = training_step(eager, x.detach().clone().requires_grad_(), g)
        for actual, wanted in zip(gradients, expected, strict=True):
            assert_close(actual, wanted)


@each_layer
def test_work_waits_for_its_own_stream(name):
    layer = LAYERS[name]()
    late, g = torch.randn(300, WIDTH), torch.randn(300, 40)
    expected = training_step(layer, late.clone().requires_grad_(), g)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros(300, WIDTH, requires_grad=True)
        torch.cuda._sleep(100_000_000)  # cycles, some tens of milliseconds
        x.data.copy_(late)
        actual = training_step(layer, x, g)
    torch.cuda.synchronize()
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_close(gradient, wanted)


@each_layer
def test_no_call_waits_for_the_gpu(name):
    layer = LAYERS[name]()
    x, g = torch.randn(300, WIDTH, requires_grad=True), torch.randn(300, 40)
    training_step(layer, x, g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(layer, x, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_layer
def test_deterministic_mode(name):
    layer = LAYERS[name]()
    x, g = torch.randn(3000, WIDTH, requires_grad=True), torch.randn(3000, 40)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (training_step(layer, x, g) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_layer
def test_another_device_than_the_current_one(name):
    layer = LAYERS[name]()
    x, g = torch.randn(300, WIDTH, requires_grad=True), torch.randn(300, 40)
    expected = training_step(layer, x, g)
    other = torch.device("cuda", 1)
    twin, x = copy.deepcopy(layer).to(other), x.detach().to(other).requires_grad_()
    actual = training_step(twin, x, g.to(other))
    assert torch.cuda.current_device() == 0
    for gradient, wanted in zip(actual, expected, strict=True):
        assert gradient.device == other
        assert_close(gradient.cpu(), wanted.cpu())


@pytest.mark.parametrize("name", ["hard FFF", "UltraFFF"])
def test_more_than_2_to_the_31_elements(name):
    """The last tokens get what they get by themselves."""
    width = 4096
    tokens = 2**31 // width + 100
    if torch.cuda.mem_get_info()[0] < 3 * tokens * width * 2:
        pytest.skip("needs 13 GB of free memory")
    with torch.inference_mode():
        if name == "UltraFFF":
            layer = UltraFFF(width, width, 2, dtype=torch.bfloat16)
        else:
            layer = FFF(width, 1, width, 2, dtype=torch.bfloat16).eval()
        x = torch.randn(tokens, width, dtype=torch.bfloat16)
        assert_close(layer(x)[-200:], layer(x[-200:].clone()))


def test_row_sparse_gradients_are_refused():
    case = make_case(row_sparse_grad=True).requires_grad()
    output = case.run(functional.tree).output
    with pytest.raises(RuntimeError, match="x must be on the CPU for row_sparse_grad, got cuda:0"):
        output.sum().backward()


@pytest.mark.parametrize("op", ["sparse_leaves", "sparse_linear_backward"])
def test_ops_of_the_cpu_refuse(op):
    arguments = {
        "sparse_leaves": [
            torch.zeros(5, 6),
            torch.ones(5, 1, 2),
            torch.zeros(2, 3, 6),
            None,
            torch.zeros(2, 3, 4),
            None,
            0.1,
            "relu",
        ],
        "sparse_linear_backward": [
            torch.zeros(5, 3),
            torch.zeros(5, 6),
            torch.zeros(3, 6),
            [True, True],
        ],
    }
    with pytest.raises(RuntimeError, match=f"fff::{op}: x must be on the CPU, got cuda:0"):
        getattr(torch.ops.fff, op)(*arguments[op])


@pytest.mark.parametrize("wrong", ["x", "node_weight", "w2"])
def test_device_mix(wrong):
    case = make_case()
    case.tensors[wrong] = case.tensors[wrong].cpu()
    with pytest.raises(RuntimeError, match=r"fff::tree: \w+ must be on .*(cpu|cuda).* got"):
        case.run(functional.tree)
    with pytest.raises(ValueError, match=r"soft_tree: \w+: expected device .* got"):
        case.run(functional.soft_tree)
