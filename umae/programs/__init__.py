"""The programs: from arguments to a finished folder."""
