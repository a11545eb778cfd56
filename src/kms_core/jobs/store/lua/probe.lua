#!lua
-- Answer the time of a Redis that has room for jobs and takes writes; otherwise Redis refuses the script. O(1).
-- KEYS: any key of jobs   ARGV: '', 1 to write in any case, the used part of maxmemory that counts as full,
--   bytes in place of maxmemory where there is none
-- Answers `full` before the memory is used up: what is left is for the broker, and for jobs to run and end;
-- else the time, and 1 if less than half of the memory is used: small blobs may rest in Redis. Notes what is free
-- of the memory that jobs may take, or without maxmemory of that of the machine, for the shares of tenants.
-- Memory is looked at twice a second at most.
if ARGV[2] == '1' or redis.call('EXISTS', P .. 'probed') == 0 then
  redis.call('SET', P .. 'probed', now, 'PX', 500)
  local memory = redis.call('INFO', 'memory')
  local used, most = string.match(memory, 'used_memory:(%d+)'), number(string.match(memory, 'maxmemory:(%d+)'))
  local limit = most > 0 and most or number(string.match(memory, 'total_system_memory:(%d+)'))
  redis.call('SET', P .. 'room', string.format('%.0f', limit * tonumber(ARGV[3]) - number(used)))
  if most > 0 and number(used) > most * tonumber(ARGV[3]) then
    redis.call('SET', P .. 'full', now, 'PX', 1000)
  end
  if most == 0 then most = tonumber(ARGV[4]) end
  if number(used) > most / 2 then redis.call('SET', P .. 'half', now, 'PX', 15000) end
end
if redis.call('EXISTS', P .. 'full') == 1 then return {'full'} end
return {clock[1], clock[2], 1 - redis.call('EXISTS', P .. 'half')}
