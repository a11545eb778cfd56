"""Jobs accepted from the API and from Celery messages."""
