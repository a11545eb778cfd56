#!lua
-- Store a job and make it ready. O(log n).
-- KEYS: job, tenant list, idempotency (optional)
-- ARGV: id, most open jobs, idempotency value, expires_at, created_at, tenant, most of the tenant (0: any),
--   bytes in the spool, most of the tenant (0: any), bytes of a large job, the broker's list or '', the
--   message, length of the next list, name and bytes of a small blob, ..., field, value, ...
-- Answers `queued` and how many wake-ups are to be sent. Of a job that is there already something is written,
-- as by each script whose writes replicas acknowledge: a connection that wrote nothing waits for nothing.
if KEYS[3] then
  local before = redis.call('GET', KEYS[3])
  if before then
    redis.call('SET', P .. 'waited', 1)
    return {'exists', before}
  end
end
if redis.call('EXISTS', job) == 1 then
  redis.call('SET', P .. 'waited', 1)
  return {'taken'}
end
local tenant = ARGV[6]
if redis.call('ZCARD', P .. 'open') >= tonumber(ARGV[2]) then return {'full'} end
redis.call('ZREMRANGEBYSCORE', quota_key(tenant), 0, now)
local most = tonumber(ARGV[7])
if most > 0 and redis.call('ZCARD', quota_key(tenant)) >= most then return {'quota'} end
local first, f = 14 + tonumber(ARGV[13]), {}
for i = first, #ARGV, 2 do f[ARGV[i]] = ARGV[i + 1] end
local group, count = group_of(typed(f))
if group and redis.call('ZCARD', P .. 'group:' .. group) >= count then return {'group'} end
local size, most_bytes, spooled = tonumber(ARGV[8]), tonumber(ARGV[9]), P .. 'spooled:' .. tenant
if size > 0 then
  if most_bytes > 0 and number(redis.call('HGET', spooled, 'sum')) + size > most_bytes then return {'spool'} end
  redis.call('HSET', spooled, id, size)
  add(spooled, 'sum', size)
end
if KEYS[3] then redis.call('SET', KEYS[3], ARGV[3], 'EXAT', math.floor(tonumber(ARGV[4]))) end
redis.call('HSET', job, 'state', 'queued', unpack(ARGV, first))
if first > 14 then redis.call('HSET', P .. 'blobs:' .. id, unpack(ARGV, 14, first - 1)) end
redis.call('ZADD', P .. 'open', now, id)
redis.call('SADD', P .. 'tenants', tenant)
redis.call('ZADD', KEYS[2], ARGV[5], id)
redis.call('ZADD', quota_key(tenant), f.run_by, id)
redis.call('ZADD', P .. 'expiring', waits_until(f), id)
redis.call('ZADD', state_key(f, 'queued'), ARGV[5], id)
for digest in string.gmatch(f.labels or '', '%x+') do redis.call('ZADD', P .. 'label:' .. digest, ARGV[5], id) end
index_group(id, f, true, tonumber(ARGV[4]) + 3600)
offer(id, f, ARGV[10])
event(f, id, 'queued', '')
return {'queued', wake(f.queue, 1, ARGV[11], ARGV[12])}
