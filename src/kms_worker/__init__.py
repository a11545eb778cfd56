"""The Celery worker: takes job ids from the broker and runs the jobs; its maintenance runs beside it."""
