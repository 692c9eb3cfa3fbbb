"""Races of event channels that Xen and guests once had, each in a file of its own with `RACE`."""
