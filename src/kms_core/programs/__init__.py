"""Child programs: started, tied to the life of this process, and restarted when they die."""
