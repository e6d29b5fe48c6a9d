"""Compiles Metal kernels with Clang and runs them on the CPU, lane by lane."""
