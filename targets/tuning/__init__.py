"""Tuned knobs: records of what was measured, their look-up, and the ways to measure."""
