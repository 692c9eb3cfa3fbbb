"""Faults on command: what they are, when they fire, and what each does."""

from pvirq.lab.faults.manager import FaultError, Faults, Firing, Rule

__all__ = ["FaultError", "Faults", "Firing", "Rule"]
