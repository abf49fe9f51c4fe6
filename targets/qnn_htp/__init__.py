"""Qualcomm's tensor processor (HTP) through QNN: parts of the plug-in "qnn-htp".

    composites ─▶ chunk.py ─▶ emitter.py ─▶ context.py ─▶ context binary ─▶ metadata.py
                  layers of     ONNX file     ONNX Runtime   for one SoC       what is in it
                  one function                with QNN                     ─▶ simulator.py
                                                                             runs it on x86-64

Nothing here is an entry point yet: `llamac compile` does not offer it. Qualcomm's libraries come
from the optional extra `llamac[qnn]`, under Qualcomm's licence; `docs/targets/hexagon-htp.md`.
"""
