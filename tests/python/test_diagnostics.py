"""Diagnostics: usage, entropies, soft against hard, verdicts, hooks, pictures."""

import math
import sys

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from torch import nn

from families import BERT
from torch_fff import FFF, UltraFFF, diagnostics, functional, reference, replace_feedforward

matplotlib.use("agg")


def line_tree(kind, depth, **options):
    """On tokens [position], position in [0, 1): leaf number floor(position * 2^depth)."""
    layer = kind(1, 3, 2, depth, **options) if kind is FFF else kind(1, 2, depth, **options)
    with torch.no_grad():
        layer.node_weights.fill_(100.0)
        for level in range(depth):
            for position in range(2**level):
                cut = (position + 0.5) / 2**level
                layer.node_biases[2**level - 1 + position] = -100.0 * cut
    return layer


def positions(counts):
    """Tokens in the middle of the leaves, ``counts`` of them each."""
    middle = (torch.arange(len(counts)) + 0.5) / len(counts)
    return middle.repeat_interleave(torch.tensor(counts))[:, None]


# ---- one layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FFF, UltraFFF])
def test_usage_of_leaves_and_nodes(kind):
    x = positions([4, 0, 1, 3]).view(2, 4, 1)
    report = line_tree(kind, 2).report(x)
    assert report.tokens == 8
    assert report.leaf_usage.tolist() == [[0.5, 0, 0.125, 0.375]]
    assert report.node_usage.tolist() == [[1, 0.5, 0.5]]
    assert report.node_split.tolist() == [[0.5, 0, 0.75]]
    assert (report.leaves, report.leaves_used) == (4, 3)
    assert report.dead_leaves.tolist() == [[False, True, False, False]]
    entropy = -sum(p * math.log(p) for p in (0.5, 0.125, 0.375))
    assert report.usage_entropy == pytest.approx(entropy)
    assert report.effective_leaves == pytest.approx(math.exp(entropy))


def test_split_of_a_node_without_tokens_is_unknown():
    report = line_tree(FFF, 2).report(positions([4, 4, 0, 0]))
    assert report.node_split.isnan().tolist() == [[False, False, True]]


def test_overfull_leaves():
    report = line_tree(FFF, 3).report(positions([5, 0, 1, 1, 1, 1, 1, 0]))
    assert not report.overfull_leaves.any()  # exactly 4 times the even share
    report = line_tree(FFF, 3).report(positions([6, 0, 1, 1, 1, 1, 1, 0]))
    assert report.overfull_leaves.tolist() == [[True] + [False] * 7]


@pytest.mark.parametrize("kind", [FFF, UltraFFF])
def test_decisions_are_those_on_the_path_at_the_layer_s_slope(kind):
    layer = line_tree(kind, 1, slope=2.0)
    x = torch.tensor([[0.5 + s / 100] for s in (-0.4, 0.6, 3.0, 0.1)])  # scores s
    report = layer.report(x)
    assert report.undecided == 0.5
    c = torch.sigmoid(2 * torch.tensor([-0.4, 0.6, 3.0, 0.1], dtype=torch.float64))
    entropy = -(c * c.log() + (1 - c) * (1 - c).log()).mean().item()
    assert report.decision_entropy == pytest.approx(entropy, rel=1e-4)


def reference_soft(layer, x):
    """At slope 1, by the definition."""
    names = ("node_weights", "node_biases", "node_outputs", "w1", "b1", "w2", "b2")
    weights = [getattr(layer, name, None) for name in names]
    options = {"trees": layer.parallel_size}
    if isinstance(layer, FFF):
        options |= {
            "node_activation": layer.node_activation,
            "leaf_activation": layer.activation,
        }
    else:
        options["node_activation"] = layer.activation
    return reference.soft_tree(x, *weights, **options).output


@pytest.mark.parametrize(
    "layer",
    [
        FFF(6, 3, 5, 3, parallel_size=2, dtype=torch.float64),
        FFF(6, 3, 5, 2, nn.GELU(), node_output=True, dtype=torch.float64),
        UltraFFF(6, 5, 2, 3, dtype=torch.float64),
        UltraFFF(6, 5, 2, bias=False, dtype=torch.float64),
    ],
    ids=["fff", "fff with node outputs", "ultra", "ultra without bias"],
)
def test_soft_output(layer, monkeypatch):
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    close = {"rtol": 1e-11, "atol": 1e-12}
    soft = diagnostics.soft_output(layer, x)
    torch.testing.assert_close(soft, reference_soft(layer, x), **close)
    monkeypatch.setattr(diagnostics, "_CHUNK", 50)  # a few tokens at a time
    torch.testing.assert_close(diagnostics.soft_output(layer, x), soft, **close)
    # A steep sigmoid is the hard decision.
    layer.slope, hard = 1e6, layer.eval()(x)
    torch.testing.assert_close(diagnostics.soft_output(layer, x), hard, **close)
    report = layer.report(x)
    assert (report.argmax_disagreement, report.undecided) == (0, 0)
    assert report.output_difference < 1e-10
    layer.slope = 1.0
    report = layer.report(x)
    share = (soft.argmax(-1) != hard.argmax(-1)).double().mean().item()
    assert report.argmax_disagreement == pytest.approx(share)
    assert report.output_difference == pytest.approx(((soft - hard).norm() / hard.norm()).item())


def test_soft_output_has_all_parts_of_a_layer():
    x = torch.randn(9, 6, dtype=torch.float64)
    layer = FFF(6, 3, 5, 2, master_leaf_width=2, shared_leaf_base=True, dtype=torch.float64)
    expected = layer(x, use_hard_decisions=False)
    torch.testing.assert_close(diagnostics.soft_output(layer, x), expected)
    ultra = UltraFFF(6, 5, 2, output_bias=True, dtype=torch.float64)
    expected = reference_soft(ultra, x) + ultra.output_bias.data.normal_()
    torch.testing.assert_close(diagnostics.soft_output(ultra, x), expected)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ([100, 0, 0, 0, 0, 0, 0, 0], "collapsed: as if 1.0 of 8 leaves were in use"),
        ([50, 0, 0, 50, 0, 0, 0, 0], "uneven: as if 2.0 of 8"),
        ([10] * 8, "healthy: as if 8.0 of 8"),
        ([1] * 8, "too few tokens to tell: 8 for 8 leaves"),
    ],
)
def test_verdict(counts, verdict):
    report = line_tree(FFF, 3).report(positions(counts))
    assert report.verdict.startswith(verdict)
    assert str(report).splitlines()[-1] == report.verdict


def test_verdict_on_close_calls():
    layer = line_tree(UltraFFF, 3)
    layer.node_weights.data /= 100
    layer.node_biases.data /= 100
    report = layer.report(positions([10] * 8))
    assert report.verdict.startswith("fragments: 100% of the decisions are close calls")


def test_report_as_text():
    text = str(line_tree(FFF, 2).report(positions([8, 0, 2, 6])))
    lines = text.splitlines()
    assert lines[0] == "FFF 1 -> 2, 1 tree of depth 2, 16 tokens"
    assert lines[1].split("  ")[-1] == "3 of 4, 0 overfull, 1 dead"
    assert "50.0% of the tokens" in text
    assert all(len(line) <= 100 for line in lines)
    assert "soft against hard" in text
    assert "soft against hard" not in str(line_tree(FFF, 2).report(torch.rand(9, 1), soft=False))


@pytest.mark.parametrize("kind", [FFF, UltraFFF])
@pytest.mark.parametrize("depth", [0, 1])
def test_shallow_trees(kind, depth):
    layer = line_tree(kind, depth)
    report = layer.report(torch.rand(20, 1))
    assert report.leaf_usage.shape == (1, 2**depth)
    assert str(report)
    layer.plot_tree(torch.rand(20, 1))
    pyplot.close("all")


def test_a_report_leaves_the_layer_as_it_was():
    layer = FFF(4, 3, 5, 2, usage_mode="hard", noise=1.0, dropout=0.5).train()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = (layer.report(torch.ones(20, 4)) for _ in range(2))
    assert str(first) == str(second)
    assert layer.training
    torch.testing.assert_close(layer.state_dict(), state)


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.zeros(3, 5), torch.tensor(1.0)])
def test_wrong_tokens(x):
    for method in ("report", "plot_tree"):
        with pytest.raises(ValueError, match=rf"{method}: x: expected shape \[..., 4\] with at"):
            getattr(FFF(4, 3, 5, 2), method)(x)


# ---- a model ------------------------------------------------------------------------------------


def test_report_on_a_model():
    torch.manual_seed(0)
    shared = UltraFFF(4, 4, 2)
    model = nn.Sequential(FFF(4, 3, 4, 3, train_hardened=True, noise=5.0), shared, shared)
    model[0].eval()
    x = torch.randn(5, 40, 4)
    found = diagnostics.report(model, x)
    assert list(found.layers) == ["0", "1"]
    assert found.layers["0"].tokens == 200
    assert found.layers["1"].tokens == 400
    assert (model.training, model[0].training) == (True, False)
    assert not model[0]._forward_pre_hooks
    alone = model[0].report(x)
    assert torch.equal(found.layers["0"].leaf_usage, alone.leaf_usage)
    leaf = functional.descend(x, model[0].node_weights, model[0].node_biases)[1].flatten()
    expected = torch.bincount(leaf, minlength=8) / 200
    torch.testing.assert_close(alone.leaf_usage[0].float(), expected)
    lines = str(found).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["0", "200", "8", str(alone.leaves_used)]
    assert lines[1].endswith(alone.verdict.split(":")[0])


def test_report_on_a_hugging_face_model():
    model = BERT.make()
    replace_feedforward(model, depth=3, parallel_size=2)
    found = diagnostics.report(model, BERT.input(), soft=False)
    assert len(found.layers) == 2
    assert all(one.leaf_usage.shape == (2, 8) for one in found.layers.values())


def test_report_needs_layers_that_run():
    with pytest.raises(ValueError, match="report: model: expected one that runs FFF"):
        diagnostics.report(nn.ReLU(), torch.zeros(3))


def test_hooks_are_gone_after_an_error():
    model = nn.Sequential(FFF(4, 3, 4, 2), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        diagnostics.report(model, torch.randn(3, 4))
    assert not model[0]._forward_pre_hooks
    assert model.training


# ---- the picture --------------------------------------------------------------------------------


def bars(axes):
    return [bar.get_height() for bar in axes.containers[0]]


def test_picture_shows_usage_and_classes():
    x = positions([4, 0, 1, 3])
    y = torch.tensor([1, 1, 1, 0, 2, 0, 0, 1])
    axes = line_tree(FFF, 2).plot_tree(x, y, classes=["a", "b", "c"])
    heights = bars(axes)
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0, 0.25, 0.75])
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["a", "b", "c"]
    by_name = dict(zip(names, axes.get_legend().get_patches(), strict=True))
    faces = [bar.get_facecolor() for bar in axes.containers[0]]
    for leaf, name in ((0, "b"), (2, "c"), (3, "a")):
        assert faces[leaf] == by_name[name].get_facecolor()
    texts = [text.get_text() for text in axes.texts]
    assert {"50%", "0%", "75%", "50.0%", "unused", "12.5%", "37.5%"} <= set(texts)
    pyplot.close("all")


def test_picture_of_a_deep_tree_is_cut():
    layer = line_tree(UltraFFF, 5)
    _, axes = pyplot.subplots()
    x = torch.rand(200, 1)
    assert layer.plot_tree(x, max_depth=2, ax=axes) is axes
    assert "drawn to depth 2" in axes.get_title()
    expected = torch.histc(x, 4, 0, 1)
    heights = torch.tensor(bars(axes)).float()
    torch.testing.assert_close(heights / heights.max(), expected / expected.max())
    assert len(bars(layer.plot_tree(x))) == 32
    assert axes.get_legend() is None
    pyplot.close("all")


def test_picture_of_one_of_several_trees():
    layer = FFF(4, 3, 5, 2, parallel_size=3)
    x = torch.randn(50, 4)
    heights = torch.tensor(bars(layer.plot_tree(x, tree=2)), dtype=torch.float64)
    usage = layer.report(x).leaf_usage[2]
    torch.testing.assert_close(heights / heights.sum(), usage)
    pyplot.close("all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": 1}, "tree: expected an index below 1, got 1"),
        ({"max_depth": 0}, "max_depth: expected an integer >= 1"),
        ({"y": torch.zeros(4, dtype=torch.int64)}, r"y: expected integers >= 0 \[5\]"),
        ({"y": torch.zeros(5)}, "y: expected integers"),
        ({"y": torch.tensor([0, 1, -1, 0, 0])}, "y: expected integers"),
        ({"y": torch.arange(5), "classes": ["a"]}, "classes: expected names of 5 classes"),
    ],
)
def test_wrong_arguments_of_the_picture(options, message):
    with pytest.raises(ValueError, match=f"plot_tree: {message}"):
        FFF(4, 3, 5, 2).plot_tree(torch.randn(5, 4), **options)


def test_picture_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot_tree: expected the package matplotlib"):
        FFF(4, 3, 5, 2).plot_tree(torch.randn(5, 4))
