"""fff::descend routes as fff::tree does."""

import pytest
import torch

from cases import make_case
from tolerances import assert_close
from torch_fff import functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUTING = ("x", "node_weight", "node_bias", "noise")


def routes(case, function):
    tensors = {name: tensor for name, tensor in case.tensors.items() if name in ROUTING}
    options = {k: v for k, v in case.options.items() if k in ("trees", "tie_right")}
    return function(**tensors, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"tokens": tokens} for tokens in [(), (0,), (1,), (64,), (300,), (2, 3, 5)]),
        *({"levels": levels, "width": 33} for levels in [0, 1, 2, 4, 5, 6, 9]),
        *({"width": width} for width in [1, 3, 784]),
        {"trees": 3, "noise": True, "tie_right": False},
        {"node_bias": False, "trees": 2},
        {"contiguous": False, "noise": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device, dtype, options):
    case = make_case(dtype=dtype, device=device, **options)
    scores, leaf = routes(case, functional.descend)
    expected_scores, expected_leaf = routes(case.to(torch.float64), reference.descend)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(leaf, expected_leaf)
    assert_close(scores, expected_scores)
    assert torch.equal(leaf, case.run(functional.tree).leaf)


def test_counts_the_last_decision_of_a_tree_of_neurons():
    """tree names the last neuron, descend the side on which it is left."""
    case = make_case(leaf_width=None, tokens=(100,), trees=2)
    _, leaf = routes(case, functional.descend)
    assert leaf.max() >= 4
    assert torch.equal(leaf // 2, case.run(functional.tree).leaf)


def test_infinite_noise_decides():
    case = make_case(noise=True)
    for sign, leaf in [(1, 7), (-1, 0)]:
        case.tensors["noise"].fill_(sign * torch.inf)
        assert (routes(case, functional.descend)[1] == leaf).all()


def test_not_differentiable():
    case = make_case().requires_grad()
    scores, _ = routes(case, functional.descend)
    with pytest.raises(RuntimeError):
        scores.sum().backward()
