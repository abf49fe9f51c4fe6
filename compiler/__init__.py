"""The compiler: front ends, IR of composites, pipeline, reference arithmetic, bundles, verify."""
