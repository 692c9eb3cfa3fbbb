"""Xen's public interface as data: one module per public header, no behaviour."""
