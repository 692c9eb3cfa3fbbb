"""The ends of domain 0's network that are no domains: a station in Python, user-mode NAT, a tap device."""
