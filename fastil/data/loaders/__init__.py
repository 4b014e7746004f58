"""What brings images to the device."""
