"""From batches to weights: one loop, what pre-training and fine-tuning put into it, checkpoints and logs."""
