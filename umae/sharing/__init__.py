"""Sharing a run: model cards, figures, reports, the Hub."""
