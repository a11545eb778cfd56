"""What a worker does with one job, by kind."""
