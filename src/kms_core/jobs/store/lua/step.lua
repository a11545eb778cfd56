#!lua flags=allow-oom
-- Note the progress of a part over many files: attempts and deferrals count from here. O(1).
-- KEYS: job   ARGV: id, attempt id, checkpoint, field, value, ...
local ours, state, cancel = held(ARGV[2])
if not ours or state ~= 'running' then return {'lost'} end
if cancel then return {'cancel'} end
if redis.call('HGET', job, 'log') == ARGV[3] then
  redis.call('HSET', job, 'log', ARGV[3])
  return {'stepped'}
end
if record(job).run_by <= now then return {'expired'} end
redis.call('HSET', job, 'log', ARGV[3], 'attempt', 1, 'deferrals', 0, unpack(ARGV, 4))
return {'stepped'}
