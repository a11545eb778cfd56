#!lua
-- Send a delivery that was given up again. O(n) in the dead deliveries.
-- KEYS: dead, entries, due, endpoints   ARGV: the entry as it lies, delivery id, entry, endpoint, when
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return {'gone'} end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[5], ARGV[2])
redis.call('SADD', KEYS[4], ARGV[4])
return {'sent'}
