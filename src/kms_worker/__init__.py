"""The Celery worker: takes job ids from the broker and runs the jobs; the reaper runs beside it."""
