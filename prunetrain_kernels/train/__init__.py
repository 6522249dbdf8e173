"""Training: Algorithm 1, the object for a stranger's loop, the run log and its report."""
