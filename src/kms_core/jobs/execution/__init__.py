"""Execution of jobs in a worker, by kind of job."""
