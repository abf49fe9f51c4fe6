"""llamac compiles quantized Llama models into shared libraries for one SoC."""

__version__ = "0.1.0"
