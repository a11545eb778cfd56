#!lua flags=allow-oom
-- Give a job back, to run after a delay; one that is committing keeps its state, for any worker to finish.
-- O(log n).
-- KEYS: job   ARGV: id, attempt id, delay_s, 1 if something was away, the bytes that it turned out to read, or '',
--   bytes of a large job, error code
-- The attempt does not count.
local f = record(job)
if not held(f, ARGV[2]) then return {'lost'} end
local delay_s, state = tonumber(ARGV[3]), f.state
note_past(f, 'deferred', ARGV[7])
add(job, 'deferrals', ARGV[4])
if ARGV[5] ~= '' then
  redis.call('HSET', job, 'work_bytes', ARGV[5])
  f.work_bytes = ARGV[5]
end
give_back(f, delay_s)
if delay_s <= 0 then ready(id, f, ARGV[6])
elseif state == 'running' then redis.call('ZADD', P .. 'delayed', now + delay_s, id)
else
  redis.call('HSET', job, 'lease_until', now + delay_s)
  redis.call('ZADD', P .. 'leased', now + delay_s, id)
end
if state == 'committing' then return {'deferred'} end
add(job, 'attempt', -1)
event(f, id, 'queued', 'deferred')
return {'deferred'}
