"""Jobs: work that outlives any process. Redis holds the truth; a broker message only wakes a worker."""
