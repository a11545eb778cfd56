#!lua
-- Answer the time of a Redis that has room for jobs and takes writes; otherwise Redis refuses the script. O(1).
-- KEYS: any key of jobs   ARGV: '', 1 to write in any case, the used part of maxmemory that counts as full
-- Answers `full` before the memory is used up: what is left is for the broker, and for jobs to run and end;
-- else the time, and 1 if less than half of the memory is used: small blobs may rest in Redis.
-- Memory is looked at twice a second at most.
-- A mark that lasts for longer than it can, or without end, was written by others.
local function lasts(mark, most_ms)
  local left = redis.call('PTTL', P .. mark)
  return left > 0 and left <= most_ms
end
if ARGV[2] == '1' or not lasts('probed', 500) then
  redis.call('SET', P .. 'probed', now, 'PX', 500)
  local memory = redis.call('INFO', 'memory')
  local used, most = string.match(memory, 'used_memory:(%d+)'), number(string.match(memory, 'maxmemory:(%d+)'))
  if most > 0 and number(used) > most * tonumber(ARGV[3]) then
    redis.call('SET', P .. 'full', now, 'PX', 1000)
  end
  if most > 0 and number(used) > most / 2 then redis.call('SET', P .. 'half', now, 'PX', 15000) end
end
if lasts('full', 1000) then return {'full'} end
local half = redis.call('PTTL', P .. 'half')  -- below 0 without an expiry or a mark
if half == -1 or half > 60000 then
  redis.call('DEL', P .. 'half')
  half = -2
end
return {clock[1], clock[2], half > 0 and 0 or 1}
