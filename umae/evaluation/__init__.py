"""Evaluation of features: extraction, probes, measures of collapse, and evaluation during training."""
