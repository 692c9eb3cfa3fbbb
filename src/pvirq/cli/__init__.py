"""The `pvirq` command: parse, call, print. The one part that reads the wall clock and handles signals."""
