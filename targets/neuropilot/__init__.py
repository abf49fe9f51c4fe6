"""MediaTek's APU through .tflite files: parts of a plug-in.

    composites ─▶ chunk.py ─▶ emitter.py ──────────▶ .tflite ─▶ MediaTek's compiler, elsewhere
                  layers of     norm.py, attention.py        ─▶ interpreter.py
                  one function    operations.py                 runs it here
                                  tflite_file.py

Nothing here compiles for an APU: that needs MediaTek's SDK, or a phone. The format and the
interpreter come from the optional extra `llamac[apu]`.
"""
