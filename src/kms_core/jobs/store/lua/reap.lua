#!lua flags=allow-oom
-- Look after one open job: a lease that ran out, a delay that is over, an expiry, a job of an older version
-- that is in no set. O(log n).
-- KEYS: job   ARGV: id, bytes of a large job, keep_s
-- Answers a word. A committing job keeps its state, for any worker to finish.
local f = record(job)
if not f.state or (f.state ~= 'queued' and f.state ~= 'running' and f.state ~= 'committing') then
  for _, set in ipairs({ 'open', 'leased', 'delayed', 'expiring' }) do redis.call('ZREM', P .. set, id) end
  unready(id, f)
  return {f.state or 'gone'}
end
if not f.parent then redis.call('ZADD', state_key(f, f.state), number(f.created_at), id) end
local g = redis.call('HMGET', job, 'lease_until', 'not_before', 'parts', 'cancel')
if f.state ~= 'queued' and number(g[1]) > now then
  redis.call('ZADD', P .. 'leased', number(g[1]), id)
  return {'leased'}
end
if parts_ended(job) then
  redis.call('ZADD', P .. 'leased', now + 5, id)
  redis.call('ZADD', P .. 'chores', now, id)
  return {'parts_ended'}
end
if f.state == 'running' and (g[4] == '1' or parent_stopped(f.parent)) then
  end_unheld(f, 'cancelled', 'cancelled', tonumber(ARGV[3]))
  return {'cancelled'}
end
if f.state == 'running' and expiry(f) then  -- the worker did not end it
  end_unheld(f, 'failed', 'expired', tonumber(ARGV[3]))
  return {'expired'}
end
if f.state == 'running' then
  charge_lease(job, f)
  become(job, id, f, 'queued', 'lease_until', 0, 'not_before', 0)
  release(f, id)
  redis.call('ZADD', P .. 'expiring', waits_until(f), id)
  ready(id, f, ARGV[2])
  event(f, id, 'queued', 'lease_lost')
  return {'requeued'}
end
if (f.state == 'committing' or not expiry(f)) and redis.call('ZSCORE', P .. 'newer', id) then
  redis.call('ZREM', P .. 'leased', id)
  return {'newer'}
end
if f.state == 'committing' then
  release(f, id)
  ready(id, f, ARGV[2])
  return {'committing'}
end
if expiry(f) then
  end_unheld(f, 'failed', expiry(f), tonumber(ARGV[3]))
  return {'expired'}
end
redis.call('ZADD', P .. 'expiring', waits_until(f), id)
if number(g[2]) > now then
  redis.call('ZADD', P .. 'delayed', number(g[2]), id)
  return {'delayed'}
end
if redis.call('ZSCORE', waiting_key(f), id) then
  redis.call('ZREM', P .. 'delayed', id)
  open_class(f.queue, f.tenant, class_of(f, size_of(f, ARGV[2])))
  return {'queued'}
end
ready(id, f, ARGV[2])
return {'due'}
