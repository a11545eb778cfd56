"""Jobs: work that outlives any process. The record in Redis is the truth, the queue's message a nudge."""
