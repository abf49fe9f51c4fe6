"""Relax passes over composites, one a file."""
