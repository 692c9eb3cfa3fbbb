"""The hypervisor by itself: domains, event channels, timers, grants, frames. Knows nothing of CPUs."""
