"""What the studies share: data, training loop, results, plots, command-line options."""
