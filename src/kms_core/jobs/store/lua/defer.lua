#!lua flags=allow-oom
-- Give a job back, to run after a delay; one that is committing keeps its state, for any worker to finish.
-- O(log n).
-- KEYS: job   ARGV: id, attempt id, delay_s, 1 if the attempt does not count, 1 if something was away,
--   the bytes that it turned out to read, or '', bytes of a large job
local ours, state = held(ARGV[2])
if not ours then return {'lost'} end
local delay_s, f = tonumber(ARGV[3]), record(job)
if state == 'committing' then
  add(job, 'deferrals', ARGV[5])
  charge_lease(job, f)
  release(f, id)
  redis.call('HSET', job, 'lease_until', now + delay_s, 'attempt_id', '')  -- a late renewal changes nothing
  if delay_s > 0 then redis.call('ZADD', P .. 'leased', now + delay_s, id)
  else ready(id, f, ARGV[7]) end
  return {'deferred'}
end
add(job, 'attempt', -tonumber(ARGV[4]))
add(job, 'deferrals', ARGV[5])
charge_lease(job, f)
if ARGV[6] ~= '' then
  redis.call('HSET', job, 'work_bytes', ARGV[6])
  f.work_bytes = ARGV[6]
end
become(job, id, f, 'queued', 'lease_until', 0, 'not_before', now + delay_s)
release(f, id)
redis.call('ZADD', P .. 'expiring', waits_until(f), id)
redis.call('ZADD', P .. 'open', now + delay_s, id)
if delay_s > 0 then redis.call('ZADD', P .. 'delayed', now + delay_s, id)
else ready(id, f, ARGV[7]) end
event(f, id, 'queued', 'deferred')
return {'deferred'}
