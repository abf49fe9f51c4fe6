"""MediaTek APU: chunks of layers as .tflite files with int16 activations."""
