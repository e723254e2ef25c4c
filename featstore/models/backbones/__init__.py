"""Loaded models, one module a family: stock modules on one device behind one interface."""
