#!lua flags=allow-oom
-- Give back a job that a worker of this version cannot do, as its sealed record says: without an attempt, and
-- until a newer worker takes it. O(log n).
-- KEYS: job   ARGV: id, attempt id, the feature that it needs
local ours, state = held(ARGV[2])
if not ours then return {'lost'} end
local f = record(job)
charge_lease(job, f)
release(f, id)
redis.call('HSET', job, 'needs', ARGV[3], 'lease_until', 0)
if state == 'running' then
  add(job, 'attempt', -1)
  become(job, id, f, 'queued')
  redis.call('ZADD', P .. 'expiring', waits_until(f), id)
end
put_aside(job, id, f, ARGV[3])
return {'aside'}
