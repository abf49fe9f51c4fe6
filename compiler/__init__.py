"""The compiler: front ends, passes, pipeline, reference arithmetic, bundle writing, verify."""
