"""What features are worth: extraction, probes, measures of collapse, evaluation while training continues."""
