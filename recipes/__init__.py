"""Runs with their settings, by name: `umae pretrain --recipe cifar10_tiny`."""
