"""Protocols that several races have in common, close to the source: one step for each access of shared memory."""
