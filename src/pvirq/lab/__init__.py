"""The lab: what hosts are looked into and tried out with, and campaigns of many runs."""
