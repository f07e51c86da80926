"""Bad arguments of the ops and of soft_tree: the error names what, what was expected and got."""

import pytest
import torch

from cases import DIFFERENTIABLE, make_case
from torch_fff import functional


def half(t):
    return t[..., : t.shape[-1] // 2]


def changed(name, change):
    """Applies ``change`` to one tensor, or sets one option."""

    def apply(case):
        if name in case.tensors:
            case.tensors[name] = change(case.tensors[name])
        else:
            case.options[name] = change(None)
        return case

    return apply


def without(*names):
    def apply(case):
        for name in names:
            del case.tensors[name]
        return case

    return apply


# What is wrong, and what the message has to say: argument, expected, got.
TREE_ERRORS = {
    "width of x": (changed("x", half), ["x", "16", "[7, 8]"]),
    "scalar x": (changed("x", lambda t: t[0, 0]), ["x", "shape [..., "]),
    "integer x": (changed("x", torch.Tensor.long), ["x", "float32", "Long"]),
    "complex x": (changed("x", lambda t: t + 0j), ["x", "float32", "Complex"]),
    "dtype of node_weight": (
        changed("node_weight", lambda t: t.float()),
        ["node_weight", "Double"],
    ),
    "dtype of w1": (changed("w1", torch.Tensor.bfloat16), ["w1", "Double", "BFloat16"]),
    "dtype of noise": (changed("noise", torch.Tensor.half), ["noise", "Double", "Half"]),
    "rank of node_weight": (changed("node_weight", lambda t: t[0]), ["node_weight"]),
    "number of nodes": (changed("node_weight", lambda t: t[:15]), ["node_weight", "15"]),
    "nodes and trees": (changed("trees", lambda _: 2), ["node_weight", "21"]),
    "trees of zero": (changed("trees", lambda _: 0), ["trees", "0"]),
    "negative trees": (changed("trees", lambda _: -1), ["trees", "-1"]),
    "node_bias": (changed("node_bias", lambda t: t[:-1]), ["node_bias", "[21]", "[20]"]),
    "column of biases": (changed("node_bias", lambda t: t[:, None]), ["node_bias", "[21, 1]"]),
    "node_output rows": (changed("node_output", lambda t: t[1:]), ["node_output", "[21, 8]"]),
    "node_output width": (changed("node_output", half), ["node_output", "[21, 8]", "[21, 4]"]),
    "leaves of w1": (changed("w1", lambda t: t[1:]), ["w1", "24", "[23, 4, 16]"]),
    "width of w1": (changed("w1", half), ["w1", "16", "[24, 4, 8]"]),
    "rank of w1": (changed("w1", lambda t: t.flatten(0, 1)), ["w1", "[96, 16]"]),
    "b1": (changed("b1", half), ["b1", "[24, 4]", "[24, 2]"]),
    "leaf width of w2": (changed("w2", lambda t: t[:, 1:]), ["w2", "[24, 4, 8]", "[24, 3, 8]"]),
    "b2": (changed("b2", lambda t: t[:2]), ["b2", "[24, 8]", "[2, 8]"]),
    "w1 without w2": (without("w2"), ["w1", "w2"]),
    "w2 without w1": (without("w1"), ["w1", "w2"]),
    "b1 without w1": (without("w1", "w2", "b2", "leaf_scale"), ["b1"]),
    "nothing to add": (
        without("w1", "b1", "w2", "b2", "node_output", "leaf_scale"),
        ["w1", "node_output"],
    ),
    "noise levels": (changed("noise", lambda t: t[..., 1:]), ["noise", "[7, 3, 3]", "[7, 3, 2]"]),
    "noise tokens": (changed("noise", lambda t: t[1:]), ["noise", "[7, 3, 3]", "[6, 3, 3]"]),
    "leaf_scale": (changed("leaf_scale", half), ["leaf_scale", "[7, 3, 4]", "[7, 3, 2]"]),
    "alternates": (changed("alternates", half), ["alternates", "[7, 3, 3]", "[7, 3, 1]"]),
    "dtype of alternates": (
        changed("alternates", torch.Tensor.float),
        ["alternates", "Double", "Float"],
    ),
    "min_slope": (changed("min_slope", lambda _: 1.5), ["min_slope", "[0, 1]", "1.5"]),
    "node_activation": (
        changed("node_activation", lambda _: "tanh"),
        ["node_activation", "'relu'", "tanh"],
    ),
    "leaf_activation": (changed("leaf_activation", lambda _: ""), ["leaf_activation", "'relu'"]),
    "device": (changed("w2", lambda t: t.to("meta")), ["w2", "meta"]),
}
OF_DESCEND = [
    "width of x",
    "integer x",
    "dtype of node_weight",
    "number of nodes",
    "node_bias",
    "noise levels",
    "negative trees",
]
OF_SOFT_TREE = [
    name
    for name in TREE_ERRORS
    if not any(word in name for word in ("noise", "leaf_scale", "alternates", "min_slope"))
]


def bad_case(name):
    case = make_case(trees=3, node_output=True, noise=True, leaf_scale=True, alternates=True)
    change, expected = TREE_ERRORS[name]
    return change(case), expected


def check_error(function, owner, expected):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        function()
    message = str(caught.value).split("Exception raised from")[0]
    for part in (owner, *expected):
        assert part in message, message


@pytest.mark.parametrize("name", TREE_ERRORS)
def test_tree(name):
    case, expected = bad_case(name)
    check_error(lambda: case.run(functional.tree), "fff::tree", expected)


@pytest.mark.parametrize("name", OF_DESCEND)
def test_descend(name):
    case, expected = bad_case(name)
    x, node_weight, node_bias, *_ = case.arguments()
    check_error(
        lambda: functional.descend(
            x, node_weight, node_bias, noise=case.tensors["noise"], trees=case.options["trees"]
        ),
        "fff::descend",
        expected,
    )


@pytest.mark.parametrize("name", OF_SOFT_TREE)
def test_soft_tree(name):
    case, expected = bad_case(name)
    tensors = {k: t for k, t in case.tensors.items() if k in DIFFERENTIABLE}
    in_python = {
        "Double": "torch.float64",
        "BFloat16": "torch.bfloat16",
        "Long": "torch.int64",
        "Complex": "torch.complex",
        "float32": "floating-point",
    }
    expected = [in_python.get(part, part) for part in expected]
    check_error(lambda: functional.soft_tree(**tensors, **case.options), "soft_tree", expected)


@pytest.mark.parametrize(
    "leak", [torch.zeros(7, 3, 7), torch.zeros(7, 3, 1, dtype=torch.bool)], ids=["dtype", "shape"]
)
def test_leak(device, leak):
    case = make_case(trees=3)
    expected = ["leak", "bool", "[7, 3, 7]"]
    check_error(
        lambda: case.run(lambda **kw: functional.soft_tree(**kw, leak=leak.to(device))),
        "soft_tree",
        expected,
    )


@pytest.mark.parametrize("name", ["b1", "leaf_scale"])
def test_parts_of_leaves_without_leaves(name):
    case = make_case(leaf_width=None)
    case.tensors[name] = torch.zeros(8, 4).double()
    check_error(lambda: case.run(functional.tree), "fff::tree", [name, "w1"])


def test_neurons_need_a_level():
    case = make_case(leaf_width=None)
    for tensor in ("node_weight", "node_bias", "node_output"):
        case.tensors[tensor] = case.tensors[tensor][:0]
    check_error(lambda: case.run(functional.tree), "fff::tree", ["one node"])
    check_error(lambda: case.run(functional.soft_tree), "soft_tree", ["node_output"])


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        (torch.zeros(5, 6), ["node_logits", "2^depth - 1", "[5, 6]"]),
        (torch.zeros(()), ["node_logits", "2^depth - 1", "scalar"]),
        (torch.zeros(5, 7, dtype=torch.int32), ["node_logits", "float32", "Int"]),
    ],
    ids=["width", "scalar", "integer"],
)
def test_leaf_mixture(device, logits, expected):
    check_error(lambda: functional.leaf_mixture(logits.to(device)), "fff::leaf_mixture", expected)


@pytest.mark.parametrize(
    ("pre", "mixture", "activation", "expected"),
    [
        (torch.zeros(5, 10), torch.zeros(5, 4), "relu", ["pre", "[5, 4]", "[5, 10]"]),
        (torch.zeros(5, 8), torch.zeros(4, 4), "relu", ["pre", "[4, 4]", "[5, 8]"]),
        (torch.zeros(5, 8), torch.zeros(5, 0), "relu", ["pre", "[5, 0]", "[5, 8]"]),
        (torch.zeros(5, 8), torch.zeros(5, 4).double(), "relu", ["mixture", "Float", "Double"]),
        (torch.zeros(5, 8).long(), torch.zeros(5, 4).long(), "relu", ["pre", "float32", "Long"]),
        (torch.zeros(5, 8), torch.zeros(5, 4), "elu", ["activation", "'gelu_tanh'", "elu"]),
    ],
    ids=["width", "tokens", "no leaves", "dtypes", "integer", "activation"],
)
def test_gated_activation(device, pre, mixture, activation, expected):
    check_error(
        lambda: functional.gated_activation(pre.to(device), mixture.to(device), activation),
        "fff::gated_activation",
        expected,
    )


@pytest.mark.parametrize(
    ("position", "change", "expected"),
    [
        (0, lambda t: t[1:], ["grad_output", "[7, 8]", "[6, 8]"]),
        (0, lambda t: t.float(), ["grad_output", "Double", "Float"]),
        (1, lambda t: t[..., 1:], ["grad_scores", "[7, 1, 3]", "[7, 1, 2]"]),
        (2, lambda t: t[1:], ["scores", "[7, 1, 3]", "[6, 1, 3]"]),
        (3, lambda t: t[1:], ["leaf", "[7, 1]", "[6, 1]"]),
        (3, lambda t: t.int(), ["leaf", "Long", "Int"]),
    ],
)
def test_tree_backward(position, change, expected):
    case = make_case()
    output, scores, leaf = torch.ops.fff.tree(*case.arguments())
    arguments = [output, scores, scores, leaf, *case.backward_arguments(), [True] * 3]
    arguments[position] = change(arguments[position])
    check_error(lambda: torch.ops.fff.tree_backward(*arguments), "fff::tree_backward", expected)


@pytest.mark.parametrize("wild", [8, -1, 2**40 + 3])
@pytest.mark.parametrize("name", ["tree_backward", "tree_backward_rows"])
def test_leaf_outside_of_tree(device, name, wild):
    """Whatever leaf a caller passes, nothing outside the tree is read or written."""
    if name == "tree_backward_rows" and device.type != "cpu":
        pytest.skip("an op of the CPU")
    case = make_case()
    op = getattr(torch.ops.fff, name)
    output, scores, leaf = torch.ops.fff.tree(*case.arguments())

    def gradients(index):
        routes = (scores, torch.full_like(leaf, index))
        return op(output, None, *routes, *case.backward_arguments(), [True] * 3)

    for actual, expected in zip(gradients(wild), gradients(wild % 8), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("position", range(8))
def test_one_meta_tensor(device, position):
    """The dispatcher calls the fake then, which must not answer with uninitialised memory."""
    arguments = list(make_case(node_output=True).arguments())
    arguments[position] = arguments[position].to("meta")
    check_error(lambda: torch.ops.fff.tree(*arguments), "fff::tree", [device.type, "meta", "x"])


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0, ["grad_mixture", "[5, 8]"]), (2, ["mixture", "[5, 8]"])],
)
def test_leaf_mixture_backward(position, expected):
    arguments = [torch.zeros(5, 8), torch.zeros(5, 7), torch.zeros(5, 8)]
    arguments[position] = torch.zeros(5, 4)
    check_error(
        lambda: torch.ops.fff.leaf_mixture_backward(*arguments),
        "fff::leaf_mixture_backward",
        expected,
    )


def test_gated_activation_backward():
    check_error(
        lambda: torch.ops.fff.gated_activation_backward(
            torch.zeros(5, 4), torch.zeros(5, 8), torch.zeros(5, 4), "relu"
        ),
        "fff::gated_activation_backward",
        ["grad_output", "[5, 8]", "[5, 4]"],
    )
