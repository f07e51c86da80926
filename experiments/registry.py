"""All experiments, by name."""

from __future__ import annotations

from . import ablation, fashion_mnist, language_model, language_model_long, published, trees

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        *(fashion_mnist, trees, ablation, published),
        *(language_model, language_model_long),
    )
}
