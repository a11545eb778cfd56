#!lua flags=allow-oom
-- Take a free lock, or renew one's own. O(1).
-- KEYS: lock   ARGV: owner, milliseconds
-- Answers 1 if it is the owner's now.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1}
