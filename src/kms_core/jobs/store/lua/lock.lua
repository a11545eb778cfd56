#!lua flags=allow-oom
-- Take a free lock. O(1).
-- KEYS: lock   ARGV: owner, milliseconds, 1 if its owner may renew it
-- Answers 1 if it is the owner's now. One that is held for longer than it can be was written by others.
local holder, most = redis.call('GET', KEYS[1]), tonumber(ARGV[2])
if not holder then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', most)
  return {1}
end
local is_ours = holder == ARGV[1] and ARGV[3] == '1'
local left = is_ours and -1 or redis.call('PTTL', KEYS[1])
if left == -1 or left > most then redis.call('PEXPIRE', KEYS[1], most) end
return {is_ours and 1 or 0}
