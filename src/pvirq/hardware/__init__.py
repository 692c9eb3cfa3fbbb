"""The machine under domain 0: devices on its interrupt lines and messages, and their Linux drivers' interrupt side."""
