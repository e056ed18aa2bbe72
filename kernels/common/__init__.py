"""What several ops stand on: chunk plans, step kernels, Triton blocks."""
