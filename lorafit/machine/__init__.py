"""What this machine is: devices, cards by name, versions of libraries, files that lorafit ships."""
