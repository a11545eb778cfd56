#!lua flags=allow-oom
-- Note the progress of a part over many files: attempts and deferrals count from here. O(1).
-- KEYS: job   ARGV: id, attempt id, checkpoint, field, value, ...
local f = record(job)
local ours, cancel = held(f, ARGV[2])
if not ours or f.state ~= 'running' then return {'lost'} end
if cancel then return {'cancel'} end
if redis.call('HGET', job, 'log') == ARGV[3] then
  redis.call('HSET', job, 'log', ARGV[3])
  return {'stepped'}
end
if f.run_by <= now then return {'expired'} end
redis.call('HSET', job, 'log', ARGV[3], 'attempt', 1, 'deferrals', 0, unpack(ARGV, 4))
return {'stepped'}
