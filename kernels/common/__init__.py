"""What several ops stand on: checks, chunk plans, step kernels, Triton blocks. Op folders import from no other one."""
