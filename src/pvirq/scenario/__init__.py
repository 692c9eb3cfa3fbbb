"""Scenarios of modelled domains: files that say who is there and what happens."""
