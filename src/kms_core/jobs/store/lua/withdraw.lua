#!lua flags=allow-oom
-- Take back a job that no worker has started, as if it had not been submitted. O(log n).
-- KEYS: job, tenant list, idempotency (optional)   ARGV: id, sealed record
local f = record(job)
if f.state ~= 'queued' or number(redis.call('HGET', job, 'fence')) > 0 or redis.call('HGET', job, 'sealed') ~= ARGV[2] then
  return {'started'}
end
local group = group_of(f)
if group then
  redis.call('ZREM', P .. 'group:' .. group, id)
  redis.call('SREM', P .. 'group-open:' .. group, id)
  f.group = nil  -- it does not end for this job
end
close(job, id, f, 'cancelled', 'durability_unconfirmed', 0)
redis.call('ZREM', P .. 'ended', id)
forget(id, f.tenant)
if KEYS[3] then redis.call('DEL', KEYS[3]) end
redis.call('DEL', job, P .. 'blobs:' .. id)
return {'withdrawn'}
