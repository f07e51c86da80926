"""All experiments, by name."""

from __future__ import annotations

from . import fashion_mnist

EXPERIMENTS = {experiment.name: experiment for experiment in (fashion_mnist.EXPERIMENT,)}
