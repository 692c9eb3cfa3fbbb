"""Campaigns: kernels x scenarios x faults x seeds, each run independent and repeatable."""
