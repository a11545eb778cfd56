"""The Celery worker: woken by the broker, it claims jobs in Redis and runs them; maintenance is beside."""
