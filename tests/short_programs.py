"""Importing this makes runs of pre-training shorter, and the digits are made already."""

import short_runs

from umae.data.images import load_images

short_runs.change(short_runs.SHORTER)
load_images("digits")
