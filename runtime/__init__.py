"""Load a bundle and generate text; imports neither TVM nor torch nor the compiler."""
