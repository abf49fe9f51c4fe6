"""Libraries for the DSP of a phone, which its FastRPC loads into a user process."""
