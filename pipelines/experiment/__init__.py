"""Ablations as files: many heads from features that are extracted once for all of them."""
