"""Split drivers and the daemons of domain 0: xenstore, console."""
