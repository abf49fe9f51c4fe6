"""Kernel generators: Python functions that build TIR for one shape and one instruction set."""
