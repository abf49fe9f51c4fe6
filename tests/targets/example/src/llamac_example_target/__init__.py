"""A target plug-in for llamac: the class that the entry point names."""

from __future__ import annotations

from llamac_example_target.target import ExampleCpu

__all__ = ["ExampleCpu"]
