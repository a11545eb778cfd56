"""The Celery worker: takes job ids from the broker, runs jobs with the core, looks after the rest."""
