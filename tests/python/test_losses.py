"""hardening_loss and the balance losses, against their definitions written as loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_fff import FFF, UltraFFF, functional, hardening_loss, reference
from torch_fff.losses import leaf_balance_loss, node_balance_loss, node_entropies


def test_hardening_loss_sums_layers_and_nodes_and_averages_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(FFF(6, 2, 5, 3), nn.ReLU(), FFF(5, 2, 4, 2, parallel_size=2))
    x = torch.randn(3, 8, 6)
    y, first = model[0](x, return_entropies=True)
    _, second = model[2](model[1](y), return_entropies=True)
    model(x)
    loss = hardening_loss(model)
    torch.testing.assert_close(loss, first.sum() + second.sum())
    loss.backward()
    grads = [layer.node_weights.grad.clone() for layer in (model[0], model[2])]
    model.zero_grad()
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(grads, [model[0].node_weights.grad, model[2].node_weights.grad])


def test_hardening_loss_needs_a_soft_training_forward():
    model = nn.Sequential(FFF(6, 2, 5, 3), UltraFFF(5, 4, 2))
    x = torch.randn(8, 6)

    def refused():
        with pytest.raises(RuntimeError, match=r"hardening_loss: model: expected .* got none"):
            hardening_loss(model)

    refused()
    model[0](x, use_hard_decisions=True)
    refused()
    model(x)
    model[0](x, use_hard_decisions=True)
    refused()
    model(x)
    model.eval()  # what the model learnt from is not what it computes now
    refused()
    model[0](x, use_hard_decisions=False)
    refused()


def test_hardening_loss_refuses_logits_without_gradient_unless_none_is_wanted():
    model = nn.Sequential(FFF(6, 2, 5, 3))
    with torch.no_grad():
        model(torch.randn(8, 6))
        assert 0 < hardening_loss(model) <= 7 * math.log(2)
    with pytest.raises(RuntimeError, match="hardening_loss: 0: expected node logits with a grad"):
        hardening_loss(model)


def test_node_entropies_of_known_decisions():
    logits = torch.tensor([[[0.0, math.log(3)]], [[0.0, -math.log(3)]]])  # c = 1/2; 3/4, 1/4
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(node_entropies(logits), torch.tensor([math.log(2), quarter]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_extreme_and_missing_tokens_are_finite(dtype):
    extreme = torch.tensor([[[1e4]], [[-1e4]]], dtype=dtype).requires_grad_()
    for logits in (extreme, extreme[:0]):
        mixture = reference.leaf_mixture(logits)
        leaf = torch.zeros(len(logits), 1, dtype=torch.int64)
        losses = (
            node_entropies(logits).sum(),
            leaf_balance_loss(mixture),
            node_balance_loss(logits, leaf),
        )
        for loss in losses:
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
            assert grad.isfinite().all()


def test_leaf_balance_loss():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 2, 7, dtype=torch.float64)
    mixture = reference.leaf_mixture(logits).requires_grad_()
    expected = 0.0
    heaviest = 0
    for tree in range(2):
        weights = mixture[:, :, tree].flatten(0, 1)
        arrivals = [0] * 8
        for token, decisions in enumerate((logits[:, :, tree].flatten(0, 1) >= 0).tolist()):
            node = 0
            while node < 7:
                node = 2 * node + 1 + decisions[node]
            arrivals[node - 7] += 1
            heaviest += weights[token].argmax().item() == node - 7
        for leaf in range(8):
            expected = expected + weights[:, leaf].sum() * arrivals[leaf]
    assert heaviest < 30  # the path does not always end in the leaf of the largest weight
    expected = 8 / 15**2 * expected
    loss = leaf_balance_loss(mixture)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, mixture), torch.autograd.grad(expected, mixture)
    )


def test_leaf_balance_loss_is_1_when_balanced_and_the_number_of_leaves_when_collapsed():
    balanced = torch.eye(4).unsqueeze(1)
    assert leaf_balance_loss(balanced) == 1
    assert leaf_balance_loss(balanced[:1].expand(6, 1, 4)) == 4


@pytest.mark.parametrize("slope", [1.0, 2.5])
def test_node_balance_loss(slope):
    torch.manual_seed(0)
    layer = FFF(6, 2, 5, 3, parallel_size=2, dtype=torch.float64)
    nodes = (layer.node_weights, layer.node_biases)
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    leaves = (layer.w1, layer.b1, layer.w2, layer.b2)
    _, scores, leaf = functional.tree(x, *nodes, None, *leaves, trees=2)
    loss = node_balance_loss(scores, leaf, slope)

    c = torch.sigmoid(slope * F.linear(x, *nodes)).view(40, 2, 7)
    one_hot = F.one_hot(leaf.view(40, 2), 8).double()
    reach = reference.node_reach(one_hot)
    alpha = (reach * c).sum(0) / reach.sum(0).clamp(min=1e-9)
    alpha = alpha.clamp(1e-3, 1 - 1e-3)
    imbalance = -alpha.log() / 2 - (1 - alpha).log() / 2 - math.log(2)
    expected = (reach.mean(0) * imbalance).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, nodes), torch.autograd.grad(expected, nodes)
    )


def test_node_balance_loss_of_a_neuron_tree_leaves_out_the_last_level():
    torch.manual_seed(0)
    layer = UltraFFF(6, 5, 1, dtype=torch.float64)
    x = torch.randn(20, 6, dtype=torch.float64)
    _, scores, leaf = functional.tree(
        x, layer.node_weights, layer.node_biases, layer.node_outputs, tie_right=False
    )
    alpha = torch.sigmoid(x @ layer.node_weights[0] + layer.node_biases[0]).mean()
    expected = -alpha.log() / 2 - (1 - alpha).log() / 2 - math.log(2)
    torch.testing.assert_close(node_balance_loss(scores[..., :-1], leaf), expected)


def test_node_balance_loss_vanishes_only_in_balance():
    scores = torch.tensor([[[2.0]], [[-2.0]]])
    leaf = torch.tensor([[1], [0]])
    assert node_balance_loss(scores, leaf) == pytest.approx(0, abs=1e-6)
    assert node_balance_loss(scores + 1, leaf) > 0.01
