#!lua flags=allow-oom
-- Take the lease from an attempt that advances nothing, and have its worker leave alone what it works on.
-- O(log n).
-- KEYS: job   ARGV: id, attempt id, worker, seconds to leave its roots alone, bytes of a large job, keep_s
-- The attempt counts. A job that is to be cancelled ends. A commit that has begun keeps its state, for any worker to finish.
local ours, state, cancel = held(ARGV[2])
local f = record(job)
for _, resource in ipairs(resources_of(f.resources)) do
  if string.sub(resource, 1, 5) == 'root:' then
    redis.call('ZADD', stalls_key(ARGV[3]), now + ARGV[4], resource)
    redis.call('EXPIRE', stalls_key(ARGV[3]), 86400)
  end
end
if not ours or redis.call('HEXISTS', job, 'parts') == 1 then return {'lost', f.resources or ''} end
if state == 'running' and cancel then
  end_unheld(f, 'cancelled', 'cancelled', tonumber(ARGV[6]))
  return {'cancelled', f.resources or ''}
end
charge_lease(job, f)
if state == 'running' then become(job, id, f, 'queued', 'not_before', 0) end
redis.call('HSET', job, 'lease_until', 0)
add(job, 'fence', 1)
release(f, id)
redis.call('ZADD', P .. 'expiring', waits_until(f), id)
ready(id, f, ARGV[5])
if state == 'running' then event(f, id, 'queued', 'stalled') end
return {'stalled', f.resources or ''}
