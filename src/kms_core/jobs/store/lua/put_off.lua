#!lua flags=allow-oom
-- Try a delivery again later. One that was settled in between stays settled. O(log n).
-- KEYS: entries, due   ARGV: delivery id, entry, when
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return {'gone'} end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
return {'later'}
