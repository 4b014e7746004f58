"""Loaders, which bring images to the device."""
