"""The Celery worker: is woken by the broker, claims jobs in Redis and runs them, beside its upkeep."""
