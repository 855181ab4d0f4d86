"""Importing this makes runs of pre-training shorter, for tests that look at no figures (processes.py): none are drawn,
the digits are made already, and the device's rate is that of one matrix product."""

from umae import speed
from umae.data.images import load_images
from umae.sharing import gallery

gallery.draw = lambda *arguments: None
speed.SECONDS = 1e-9
load_images("digits")
