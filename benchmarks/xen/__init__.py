"""Real Xen 4.17 with a Linux domain 0 and a Linux guest, in QEMU's software emulation: what pvirq is held against."""
