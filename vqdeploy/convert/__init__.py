"""Importers of public weights, one file per code base."""
