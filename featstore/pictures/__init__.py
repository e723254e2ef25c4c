"""Features, attention and predictions made visible, and the report that shows them.

Everything takes plain numpy arrays; nothing here reads a store. matplotlib and scikit-learn are
imported when they are first needed.
"""

from __future__ import annotations

from featstore.pictures.assigners import save_assigners
from featstore.pictures.attention import attention_overlay, attention_overlays
from featstore.pictures.files import save_picture
from featstore.pictures.grid import Panel, save_grid, segmentation_panels
from featstore.pictures.overlay import label_overlay
from featstore.pictures.palette import IGNORE_COLOUR, class_colours, colour_labels, legend
from featstore.pictures.pca import PcaBasis, fit_pca, pca_pictures, stack_layers
from featstore.pictures.report import PanelTable, Report, Score, ScoreTable, Table, render_report, write_report

__all__ = [
    "IGNORE_COLOUR",
    "Panel",
    "PanelTable",
    "PcaBasis",
    "Report",
    "Score",
    "ScoreTable",
    "Table",
    "attention_overlay",
    "attention_overlays",
    "class_colours",
    "colour_labels",
    "fit_pca",
    "label_overlay",
    "legend",
    "pca_pictures",
    "render_report",
    "save_assigners",
    "save_grid",
    "save_picture",
    "segmentation_panels",
    "stack_layers",
    "write_report",
]
