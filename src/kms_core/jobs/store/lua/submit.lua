#!lua
-- Store a job and make it ready. O(log n).
-- KEYS: job, tenant list, idempotency (optional)
-- ARGV: id, most open jobs, idempotency value, expires_at, created_at, tenant, most of the tenant (0: any),
--   bytes in the spool, most of the tenant (0: any), bytes of a large job, the broker's list or '', the
--   message, 1 if other tenants are to have room, used part and bytes of the memory as in PROBE, length of the next
--   list, name and bytes of a small blob, ..., field, value, ...
-- Answers `queued`, how many wake-ups are to be sent, and what PROBE answers. Of a job that is there already something
-- is written, as by each script whose writes replicas acknowledge: a connection that wrote nothing waits for nothing.
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
local has_room = room_for_jobs(ARGV[14], ARGV[15])
if not has_room then return {'memory'} end
local tenant, shares = ARGV[6], ARGV[13] == '1'
local free = tonumber(ARGV[2]) - redis.call('ZCARD', P .. 'open')
if free <= 0 then return {'full'} end
local most, open = tonumber(ARGV[7]), lasting(quota_key(tenant))
if most > 0 and open >= most then return {'quota'} end
local first, f, memory = 17 + tonumber(ARGV[16]), {}, JOB_BYTES
for i = first, #ARGV, 2 do
  f[ARGV[i]] = ARGV[i + 1]
  memory = memory + #ARGV[i] + #ARGV[i + 1]
end
for _ in string.gmatch((f.labels or '') .. ' ' .. (f.group or ''), '%x+') do memory = memory + LIST_BYTES end
for _ in string.gmatch((f.callback or '') .. ' ' .. (f.group_callback or ''), '%S+') do
  memory = memory + 3 * (#f.sealed + 600)  -- events that wait for an endpoint, with labels and metadata
end
local blob = first > 17 and #ARGV[first - 1] or 0
local room = shares and redis.call('GET', P .. 'room')
if shares then
  local has = number(redis.call('HGET', held_key(tenant), 'sum')) + memory + blob
  if open >= free or room and has > tonumber(room) then return {'share'} end
end
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
if blob > 0 then redis.call('HSET', P .. 'blobs:' .. id, unpack(ARGV, 17, first - 1)) end
redis.call('HSET', held_key(tenant), id, memory, unpack(blob > 0 and { 'b' .. id, blob } or {}))
add(held_key(tenant), 'sum', memory + blob)
if room then redis.call('DECRBY', P .. 'room', string.format('%d', memory + blob)) end  -- until the memory is looked at again
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
return {'queued', wake(ARGV[11], ARGV[12]), unpack(has_room)}
