#!lua
-- Give a dead job all its attempts again. O(log n), and O(t) in its tallies.
-- KEYS: job   ARGV: id, sealed record of the job that is meant, new sealed record, the attempt of an end that
--   was found unproven, or '-', tenant, bytes of a large job, field, value, ... of its new times and generation
-- A job that was split into parts is split again.
local g = redis.call('HMGET', job, 'state', 'error', 'sealed', 'attempt_id', 'released')
local dead = g[1] == 'failed' and (g[2] == 'attempts_exhausted' or g[2] == 'record_refused')
local signs = g[1] == 'succeeded' or (g[1] == 'failed' and g[2] == 'items_failed')
local unproven = signs and ARGV[4] == (g[4] or '')
if g[3] ~= ARGV[2] or g[5] or not (dead or unproven) then return {'not dead'} end
local before = record(job)
if before.attempt_id == '' then before.worker = '' end  -- its last attempt is noted already
note_past(before, 'retried', g[2] or '')
for _, name in ipairs(redis.call('HKEYS', job)) do
  if string.sub(name, 1, 6) == 'tally:' then redis.call('HDEL', job, name) end
end
redis.call('HDEL', job, 'parts', 'parts_left', 'split', 'end', 'cancel', 'purged', 'started_at', 'began_at', 'ended_at')
redis.call('HSET', job, 'tenant', ARGV[5], unpack(ARGV, 7))
local f = record(job)
f.attempt = nil
become(job, id, f, 'queued', 'error', '', 'attempt', 0, 'not_before', 0, 'sealed', ARGV[3])
add(job, 'fence', 1)
redis.call('PERSIST', job)
redis.call('PERSIST', P .. 'blobs:' .. id)
for _, set in ipairs({ 'dead', 'dead:' .. f.tenant, 'ended', 'inputs' }) do redis.call('ZREM', P .. set, id) end
redis.call('ZADD', P .. 'open', now, id)
redis.call('ZADD', P .. 'expiring', waits_until(f), id)
redis.call('ZADD', quota_key(f.tenant), f.run_by, id)
index_group(id, f, true, number(f.expires_at) + 3600)
ready(id, f, ARGV[6])
event(f, id, 'queued', 'retried')
return {'queued'}
