"""What people see of a run: model cards, figures, reports, the Hub."""
