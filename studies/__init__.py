"""Grids of runs and their evaluations, by name: `umae study digits`."""
