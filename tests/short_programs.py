"""Importing this makes runs shorter, and the digits are decoded already."""

import short_runs

short_runs.change(short_runs.SHORTER)
short_runs.decoded_digits()
