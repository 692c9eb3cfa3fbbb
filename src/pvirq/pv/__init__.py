"""Runs real PV kernels: images, page tables, traps, hypercalls."""
