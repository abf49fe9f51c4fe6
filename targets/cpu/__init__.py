"""What CPU targets share: kernel selection, weight packing, memory plan, entry file, build."""
