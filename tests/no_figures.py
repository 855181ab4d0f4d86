"""Importing this keeps runs of pre-training from drawing figures, for tests that look at none."""

import short_runs

short_runs.change(short_runs.NO_FIGURES)
