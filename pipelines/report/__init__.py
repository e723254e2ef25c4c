"""One HTML file about a store, trained heads, a gate and an experiment."""

from __future__ import annotations

from featstore.pipelines.report.report import ReportConfig, ReportResult, make_report

__all__ = ["ReportConfig", "ReportResult", "make_report"]
