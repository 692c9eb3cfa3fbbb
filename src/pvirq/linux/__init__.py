"""A guest kernel's interrupt layer in Python: what modelled domains (dom0 always) run."""
