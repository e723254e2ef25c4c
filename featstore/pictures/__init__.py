"""Features, attention and predictions made visible, and the report that shows them.

Everything takes plain numpy arrays; nothing here reads a store. matplotlib and scikit-learn are
imported when they are first needed.
"""

from __future__ import annotations

from featstore.pictures.assigners import save_assigners
from featstore.pictures.attention import attention_overlay, attention_overlays
from featstore.pictures.files import save_picture
from featstore.pictures.grid import Panel, save_grid, segmentation_panels
from featstore.pictures.heat import heat_picture
from featstore.pictures.nearest_match import Match, nearest
from featstore.pictures.overlay import label_overlay
from featstore.pictures.palette import IGNORE_COLOUR, class_colours, colour_labels, legend
from featstore.pictures.pca import PcaBasis, fit_pca, pca_pictures, resize_maps, stack_layers
from featstore.pictures.pca_incremental import BasisFit
from featstore.pictures.report import render_report, write_report
from featstore.pictures.report_content import (
    Details,
    Interval,
    IntervalTable,
    PanelTable,
    Plate,
    Report,
    Score,
    ScoreTable,
    Section,
    Table,
)

__all__ = [
    "IGNORE_COLOUR",
    "BasisFit",
    "Details",
    "Interval",
    "IntervalTable",
    "Match",
    "Panel",
    "PanelTable",
    "PcaBasis",
    "Plate",
    "Report",
    "Score",
    "ScoreTable",
    "Section",
    "Table",
    "attention_overlay",
    "attention_overlays",
    "class_colours",
    "colour_labels",
    "fit_pca",
    "heat_picture",
    "label_overlay",
    "legend",
    "nearest",
    "pca_pictures",
    "render_report",
    "resize_maps",
    "save_assigners",
    "save_grid",
    "save_picture",
    "segmentation_panels",
    "stack_layers",
    "write_report",
]
