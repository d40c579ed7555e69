"""What every run needs: arguments, checkpoints, processes, failures, reports, models by name."""
