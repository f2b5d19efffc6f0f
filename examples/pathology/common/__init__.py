"""What every package uses: errors, files and folders, devices, log lines."""
