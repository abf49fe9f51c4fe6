"""Vector instructions as LLVM intrinsics, one instruction-set family a file."""
