"""Whole models: what is left of a layer's speed-up end to end. The models are BERT's encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_fff import UltraFFF, replace_feedforward
from torch_fff._blocks import find_feedforward

from .baselines.masked import MaskedTree
from .case import TRAINING, Case, ModelCase
from .check import Sample, assert_close, check_baseline, check_forward, check_training
from .results import NO_FEEDFORWARD
from .timing import Call

_INPUTS = 3


@dataclass(frozen=True)
class Built:
    """What contenders are made of. Other weights than the trees' are the dense model's own.

    All is built before anything is compiled: transformers keeps a list of the model classes in use,
    whose length compiled models check.
    """

    case: ModelCase
    dense: nn.Module
    distilbert: nn.Module
    ours: nn.Module
    samples: list[Sample]  # of the first tree


@dataclass(frozen=True)
class Contender:
    summary: str
    build: Callable[[Built], nn.Module]


def build(case: ModelCase) -> nn.Module:
    """BERT with random weights, without pooler and heads."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        intermediate_size=4 * case.width,
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.train(case.step == TRAINING)


def distilbert(case: ModelCase) -> nn.Module:
    """Half the layers, no token types; otherwise the same widths."""
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=case.vocabulary,
        dim=case.width,
        hidden_dim=4 * case.width,
        n_layers=case.layers // 2,
        n_heads=case.heads,
    )
    model: nn.Module = DistilBertModel(config)
    return model.train(case.step == TRAINING)


def with_trees(case: ModelCase, dense: nn.Module, trees: int, depth: int) -> nn.Module:
    model = _variant(dense)
    torch.manual_seed(trees)
    replace_feedforward(model, depth=depth, parallel_size=trees, reversible=False)
    return model


def calls(case: ModelCase, models: dict[str, nn.Module]) -> dict[str, Sequence[Call]]:
    wrap = _training_step if case.step == TRAINING else _last_hidden_state
    return {name: [wrap(model)] for name, model in models.items()}


def inputs(case: ModelCase) -> list[Any]:
    """Token numbers [batch, sequence]; for training also the gradient of the last hidden state."""
    torch.manual_seed(case.tokens)
    shape = (case.batch, case.sequence)
    ids = [torch.randint(case.vocabulary, shape) for _ in range(_INPUTS)]
    if case.step != TRAINING:
        return ids
    return [(x, torch.randn(*shape, case.width)) for x in ids]


def check(case: ModelCase, model: nn.Module, batch: Any) -> tuple[dict[str, float], list[Sample]]:
    """The model's first and last tree on what reaches them, against the reference.

    Deviations, and samples of the first.
    """
    blocks = find_feedforward(model)
    deviations: dict[str, float] = {}
    samples: list[Sample] = []
    for name, block in (("first", blocks[0]), ("last", blocks[-1])):
        layer = block.replacement
        assert isinstance(layer, UltraFFF)
        x, y = _seen(layer, model, batch[0] if case.step == TRAINING else batch)
        of_layer = _layer_case(case, layer)
        if case.step == TRAINING:
            found, some = check_training(of_layer, layer, x, batch[1].flatten(0, 1))
        else:
            found, some = check_forward(of_layer, layer, [x])
        deviations.update({f"{name} {key}": value for key, value in found.items()})
        assert_close("the model's block", y[some[0].rows], some[0].output)
        samples = samples or some
    return deviations, samples


def needed_bytes(case: ModelCase) -> int:
    """An estimate: weights of all contenders, activations of one step."""
    weights = (case.vocabulary + case.layers * 12 * case.width) * case.width * 4
    held = 40 if case.step == TRAINING else 8
    return 8 * weights + held * case.layers * case.tokens * case.width * 4


class _Flat(nn.Module):
    """Calls a module of [tokens, in] with [batch, sequence, in]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.flatten(0, -2))
        return y.view(*x.shape[:-1], -1)


def _variant(model: nn.Module) -> nn.Module:
    """A copy that shares all parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _with_blocks(dense: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    model = _variant(dense)
    for block, module in zip(find_feedforward(model), modules, strict=True):
        block.replace_with(module)
        block.discard()
    return model


def _masked(built: Built) -> nn.Module:
    trees = [block.replacement for block in find_feedforward(built.ours)]
    masked = [_Flat(MaskedTree(_layer_case(built.case, tree), tree)) for tree in trees]
    check_baseline("masked", masked[0], built.samples)
    return _with_blocks(built.dense, masked)


def _without_feedforward(built: Built) -> nn.Module:
    return _with_blocks(built.dense, (nn.Identity() for _ in range(built.case.layers)))


def _compiled(built: Built, model: nn.Module) -> nn.Module:
    """In inference with freezing, which lays the weights out for the kernels."""
    from torch._inductor import config  # slow to import

    fast: nn.Module = torch.compile(model, dynamic=False, fullgraph=True)  # type: ignore
    training = built.case.step == TRAINING
    batch = inputs(built.case)[0]  # an inference tensor would be compiled for by itself
    # Dynamo, too, must see that weights will be frozen: as an option of torch.compile it is late.
    with config.patch(freezing=not training), torch.inference_mode(not training):
        if training:
            _training_step(fast)(batch)
            return fast
        output = fast(batch)[0]
        if model is not built.ours:  # whose tokens may go another way after another rounding
            assert_close("compiled", output, model(batch)[0])
    return fast


CONTENDERS = {
    "dense-eager": Contender("BERT", lambda built: built.dense),
    "dense-compiled": Contender(
        "BERT through torch.compile, in inference with freezing",
        lambda built: _compiled(built, built.dense),
    ),
    "distilbert": Contender("DistilBERT: half the layers", lambda built: built.distilbert),
    "distilbert-compiled": Contender(
        "DistilBERT through torch.compile", lambda built: _compiled(built, built.distilbert)
    ),
    "ours-compiled": Contender(
        "BERT with trees through torch.compile", lambda built: _compiled(built, built.ours)
    ),
    "ours-16x7": Contender(
        "BERT with 16 trees of depth 7 a layer",
        lambda built: with_trees(built.case, built.dense, 16, 7),
    ),
    "ours-4x9": Contender(
        "BERT with 4 trees of depth 9 a layer",
        lambda built: with_trees(built.case, built.dense, 4, 9),
    ),
    "ours-masked": Contender("BERT with masked trees, as UltraFastBERT ships", _masked),
    NO_FEEDFORWARD: Contender(
        "BERT without feedforward blocks: the limit of what they can gain", _without_feedforward
    ),
}


def _layer_case(case: ModelCase, layer: Any) -> Case:
    return Case(
        case.suite,
        layer.depth,
        case.tokens,
        layer.parallel_size,
        input_width=case.width,
        output_width=case.width,
        step=case.step,
    )


def _seen(layer: nn.Module, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the layer in a forward of the model, and its output; [tokens, width] each."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        seen.extend(t.detach().flatten(0, -2) for t in (arguments[0], output))

    hook = layer.register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    hook.remove()
    x, y = seen
    return x, y


def _last_hidden_state(model: nn.Module) -> Call:
    return lambda ids: model(ids)[0]


def _training_step(model: nn.Module) -> Call:
    """Gradients of all weights, from none."""
    parameters = list(model.parameters())

    def step(batch: tuple[Tensor, Tensor]) -> None:
        ids, grad = batch
        for parameter in parameters:
            parameter.grad = None
        model(ids)[0].backward(grad)

    return step
