#!lua flags=allow-oom
-- Take a free lock. O(1).
-- KEYS: lock   ARGV: owner, milliseconds, 1 if its owner may renew it
-- Answers 1 if it is the owner's now.
local holder, most = redis.call('GET', KEYS[1]), tonumber(ARGV[2])
if not holder then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', most)
  return {1}
end
if holder ~= ARGV[1] or ARGV[3] ~= '1' then return {0} end
redis.call('PEXPIRE', KEYS[1], most)
return {1}
