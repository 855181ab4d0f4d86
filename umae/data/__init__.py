"""Data sets and batches: images, labels, crops, augmentation, streaming."""
