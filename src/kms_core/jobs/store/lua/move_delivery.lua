#!lua flags=allow-oom
-- Put a delivery of a webhook off, give it up, or send it again. One that was settled in between stays settled.
-- O(log n).
-- KEYS: set that it is in, set that it goes to   ARGV: entry as it lies, entry as it goes on, score of that
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return {'gone'} end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
return {'moved'}
