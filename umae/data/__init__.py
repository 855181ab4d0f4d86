"""From files to batches on the device: images, labels, crops, augmentation, streaming."""
