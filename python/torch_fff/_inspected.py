"""What both layers offer for looking into them; the work is done by ``diagnostics``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .diagnostics import Layer, LayerReport


class Inspected:
    """A layer with a report and a picture."""

    def report(self, x: Tensor, *, soft: bool = True) -> LayerReport:
        """What the layer does with tokens ``x`` [..., in]; prints as a table with a verdict.

        See :func:`torch_fff.diagnostics.layer_report`.
        """
        from . import diagnostics

        return diagnostics.layer_report(cast("Layer", self), x, soft=soft)

    def plot_tree(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Axes:
        """Draw what a tree of the layer does with tokens ``x`` [..., in] of classes ``y`` [...].

        See :func:`torch_fff.diagnostics.plot_tree`.
        """
        from . import diagnostics

        return diagnostics.plot_tree(cast("Layer", self), x, y, **options)
