"""Figures of a report: what is redundant and skipped where, what it costs, how deep each patch and word is computed.

Each `draw_*` returns a `matplotlib.figure.Figure`, each `plot_*` saves one as PNG or SVG. Nothing touches pyplot's
global state. Colours are safe for colour-blind readers: viridis for values, Okabe and Ito's for lines and points.
"""

from .curves import Interval, Point, draw_growing_sets, draw_intervals, draw_pareto, draw_skip_rates, plot_pareto
from .depth import draw_depth_map, plot_depth_map
from .style import as_svg
from .units import draw_layer_modality_heatmaps, draw_scatter, plot_layer_modality_heatmaps, plot_scatter

__all__ = [
    "Interval",
    "Point",
    "as_svg",
    "draw_depth_map",
    "draw_growing_sets",
    "draw_intervals",
    "draw_layer_modality_heatmaps",
    "draw_pareto",
    "draw_scatter",
    "draw_skip_rates",
    "plot_depth_map",
    "plot_layer_modality_heatmaps",
    "plot_pareto",
    "plot_scatter",
]
