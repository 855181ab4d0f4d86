"""Importing this makes runs of pre-training shorter, for tests that look at no figures (processes.py): none are drawn,
and the digits are made already."""

from umae.data.images import load_images
from umae.sharing import gallery

gallery.draw = lambda *arguments: None
load_images("digits")
