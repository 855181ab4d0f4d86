"""What has to be tried and measured once a GPU is at hand, see `python -m benchmarks.gpu --help`."""
