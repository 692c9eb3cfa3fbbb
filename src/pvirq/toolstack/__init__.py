"""What xl does: find a kernel, make an initrd, lay out a domain in xenstore."""
