"""A small local web app over a store: pictures side by side, and nearest matches of a point."""

from __future__ import annotations

from featstore.pipelines.browse.server import BrowseConfig, Browsing, browse

__all__ = ["BrowseConfig", "Browsing", "browse"]
