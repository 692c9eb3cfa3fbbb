"""Protocols that several races use: each function a generator named after the one in Xen or Linux that it follows."""
