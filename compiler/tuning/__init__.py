"""The tuner: what is measured, in which order, and what is believed of what is not measured."""
