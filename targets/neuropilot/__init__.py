"""MediaTek's APU through NeuroPilot: parts of the plug-in "neuropilot"."""
