#!lua flags=allow-oom
-- Look after one open job: a lease that ran out, a delay that is over, an expiry. O(log n).
-- KEYS: job   ARGV: id, bytes of a large job, keep_s
-- Answers a word. A committing job keeps its state, for any worker to finish.
local f = record(job)
if not f.state or (f.state ~= 'queued' and f.state ~= 'running' and f.state ~= 'committing') then
  for _, set in ipairs({ 'open', 'leased', 'delayed', 'expiring' }) do redis.call('ZREM', P .. set, id) end
  unready(id, f)
  return {f.state or 'gone'}
end
local g = redis.call('HMGET', job, 'lease_until', 'not_before', 'cancel')
if f.state ~= 'queued' and number(g[1]) > now then return {'leased'} end
if parts_ended(job) then
  redis.call('ZADD', P .. 'leased', now + 5, id)
  redis.call('ZADD', P .. 'chores', now, id)
  return {'parts_ended'}
end
if f.state == 'running' then note_lost(f) end
if f.state == 'running' and (g[3] == '1' or parent_stopped(f.parent)) then
  end_unheld(f, 'cancelled', 'cancelled', tonumber(ARGV[3]))
  return {'cancelled'}
end
if f.state ~= 'committing' and expiry(f) then
  end_unheld(f, 'failed', expiry(f), tonumber(ARGV[3]))
  return {'expired'}
end
if f.state == 'running' then
  give_back(f, 0)
  ready(id, f, ARGV[2])
  event(f, id, 'queued', 'lease_lost')
  return {'requeued'}
end
if redis.call('ZSCORE', P .. 'newer', id) then
  redis.call('ZREM', P .. 'leased', id)
  return {'newer'}
end
if f.state == 'committing' then
  release(f, id)
  ready(id, f, ARGV[2])
  return {'committing'}
end
if number(g[2]) > now then
  redis.call('ZADD', P .. 'delayed', number(g[2]), id)
  return {'delayed'}
end
ready(id, f, ARGV[2])
return {'due'}
