"""The Lua scripts that change a job's state: each compares and sets in one step, on the server's clock.

Every script gets the job's hash as its first key and its id as its first argument, and answers a list
whose first element is a word. Shared sets: ``open`` (jobs that have not ended, by when to look next),
``ended`` (results by expiry), ``dead`` (attempts exhausted), ``tenant:<t>`` (its jobs by age),
``running:<t>`` (its leases), ``events`` (a stream with one record per transition).
"""

from typing import Final

_LIBRARY: Final = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local job, id = KEYS[1], ARGV[1]

local function event(key, name, state, code)
  local f = redis.call('HMGET', key, 'tenant', 'kind', 'fence', 'attempt', 'parent')
  if f[5] then return end  -- of a job in parts, only the whole is told
  redis.call('XADD', 'kms:events', 'MAXLEN', '~', 100000, '*', 'specversion', '1.0',
    'type', 'kms.job.' .. state, 'source', '/api/v1/kms/jobs', 'subject', name,
    'id', name .. '.' .. (f[3] or '0') .. '.' .. state .. '.' .. clock[1] .. clock[2], 'time', tostring(now),
    'tenant', f[1] or '', 'kind', f[2] or '', 'attempt', f[4] or '0', 'code', code)
end

local function lease(score)
  redis.call('ZADD', 'kms:running:' .. (redis.call('HGET', job, 'tenant') or ''), score, id)
end

local function unlease(key, name)
  redis.call('ZREM', 'kms:running:' .. (redis.call('HGET', key, 'tenant') or ''), name)
end

local function close(key, name, state, code, keep_s)
  redis.call('HSET', key, 'state', state, 'error', code, 'lease_until', 0, 'ended_at', now)
  redis.call('ZREM', 'kms:open', name)
  unlease(key, name)
  local expires = tonumber(redis.call('HGET', key, 'expires_at'))
  redis.call('ZADD', 'kms:ended', expires, name)
  redis.call('EXPIREAT', key, math.floor(expires + keep_s))
  event(key, name, state, code)
end

-- A part that ends counts for the whole; the last one ends it.
local function count(parent, state, code, keep_s)
  local whole = 'kms:job:' .. parent
  if redis.call('HGET', whole, 'state') ~= 'running' then return end
  local f = redis.call('HMGET', job, 'items', 'items_failed', 'bytes')
  local failed = f[1]
  if state == 'succeeded' or code == 'items_failed' then failed = f[2] or 0 end
  redis.call('HINCRBY', whole, 'items_done', f[1])
  redis.call('HINCRBY', whole, 'items_failed', failed)
  redis.call('HINCRBY', whole, 'bytes_done', f[3])
  if redis.call('HINCRBY', whole, 'parts_left', -1) > 0 then return end
  local w = redis.call('HMGET', whole, 'cancel', 'items_failed')
  if w[1] == '1' then close(whole, parent, 'cancelled', 'cancelled', keep_s)
  elseif tonumber(w[2]) > 0 then close(whole, parent, 'failed', 'items_failed', keep_s)
  else close(whole, parent, 'succeeded', '', keep_s) end
end

local function finish(state, code, keep_s)
  close(job, id, state, code, keep_s)
  local parent = redis.call('HGET', job, 'parent')
  if parent then count(parent, state, code, keep_s)
  elseif code == 'attempts_exhausted' then redis.call('ZADD', 'kms:dead', now, id) end
end

local function stopped_whole(parent)
  if not parent then return false end
  local w = redis.call('HMGET', 'kms:job:' .. parent, 'state', 'cancel')
  return w[1] ~= 'running' or w[2] == '1'
end

local function held(fence)
  local f = redis.call('HMGET', job, 'state', 'fence', 'cancel', 'parent')
  local ours = (f[1] == 'running' or f[1] == 'committing') and f[2] == fence
  return ours, f[1], f[3] == '1' or stopped_whole(f[4])
end
"""

SUBMIT: Final = (
    _LIBRARY
    + """
-- KEYS: job, tenant list, idempotency (optional)
-- ARGV: id, most open jobs, idempotency value, expires_at, created_at, field, value, ...
if KEYS[3] then
  local before = redis.call('GET', KEYS[3])
  if before then return {'exists', before} end
end
if redis.call('EXISTS', job) == 1 then return {'taken'} end
if redis.call('ZCARD', 'kms:open') >= tonumber(ARGV[2]) then return {'full'} end
if KEYS[3] then redis.call('SET', KEYS[3], ARGV[3], 'EXAT', math.floor(tonumber(ARGV[4]))) end
redis.call('HSET', job, 'state', 'queued', unpack(ARGV, 6))
redis.call('ZADD', 'kms:open', ARGV[5], id)
redis.call('ZADD', KEYS[2], ARGV[5], id)
event(job, id, 'queued', '')
return {'queued'}
"""
)

CLAIM: Final = (
    _LIBRARY
    + """
-- KEYS: job, busy sign of the worker
-- ARGV: id, worker, lease_s, max attempts, keep_s, most leases of a tenant
redis.call('SET', KEYS[2], now, 'EX', 3600)
local f = redis.call('HMGET', job, 'state', 'lease_until', 'not_before', 'cancel', 'expires_at',
  'attempt', 'fence', 'sealed', 'commit', 'created_at', 'deferrals', 'tenant', 'parent')
local state = f[1]
if not state then return {'gone'} end
if state ~= 'queued' and state ~= 'running' and state ~= 'committing' then return {'ended'} end
if state ~= 'queued' and tonumber(f[2] or 0) > now then return {'leased'} end
if state == 'queued' and tonumber(f[3] or 0) > now then return {'early'} end
local fence, attempt = tonumber(f[7] or 0) + 1, tonumber(f[6] or 0)
if state ~= 'committing' then
  local code, final = '', 'failed'
  if f[4] == '1' or stopped_whole(f[13]) then code, final = 'cancelled', 'cancelled'
  elseif tonumber(f[5]) <= now then code = 'expired'
  elseif attempt >= tonumber(ARGV[4]) then code = 'attempts_exhausted' end
  if code ~= '' then
    redis.call('HSET', job, 'fence', fence)
    finish(final, code, tonumber(ARGV[5]))
    return {'closed', final, code}
  end
  local leases = 'kms:running:' .. f[12]
  redis.call('ZREMRANGEBYSCORE', leases, 0, now)
  if redis.call('ZCARD', leases) >= tonumber(ARGV[6]) then
    redis.call('ZADD', 'kms:open', now + 1, id)
    return {'capped'}
  end
  attempt = attempt + 1
  redis.call('HSET', job, 'state', 'running', 'bytes_done', 0, 'items_done', 0, 'items_failed', 0)
end
local lease_until = now + tonumber(ARGV[3])
redis.call('HSET', job, 'fence', fence, 'attempt', attempt, 'lease_until', lease_until, 'worker', ARGV[2])
redis.call('ZADD', 'kms:open', lease_until, id)
lease(lease_until)
if state ~= 'committing' then event(job, id, 'running', '') end
return {'claimed', fence, attempt, f[8], state == 'committing' and f[9] or '',
  tostring(now - tonumber(f[10])), f[11] or 0}
"""
)

RENEW: Final = (
    _LIBRARY
    + """
-- KEYS: job, busy sign of the worker   ARGV: id, fence, lease_s, field, value, ...
local ours, _, cancel = held(ARGV[2])
if not ours then return {'lost'} end
local lease_until = now + tonumber(ARGV[3])
redis.call('SET', KEYS[2], now, 'EX', 3600)
redis.call('HSET', job, 'lease_until', lease_until, unpack(ARGV, 4))
redis.call('ZADD', 'kms:open', lease_until, id)
lease(lease_until)
return {cancel and 'cancel' or 'held'}
"""
)

SPLIT: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, then of each part: id, sealed record, items, bytes
-- The job becomes the whole of its parts: it runs without a lease until the last of them ends.
local ours, state, cancel = held(ARGV[2])
if not ours or state ~= 'running' then return {'lost'} end
if cancel then return {'cancel'} end
local f = redis.call('HMGET', job, 'tenant', 'kind', 'queue', 'created_at', 'expires_at')
local parts = 0
for i = 3, #ARGV, 4 do
  redis.call('HSET', 'kms:job:' .. ARGV[i], 'state', 'queued', 'sealed', ARGV[i + 1], 'items', ARGV[i + 2],
    'bytes', ARGV[i + 3], 'tenant', f[1], 'kind', f[2], 'queue', f[3], 'created_at', f[4],
    'expires_at', f[5], 'parent', id)
  redis.call('ZADD', 'kms:open', now + 10, ARGV[i])
  parts = parts + 1
end
redis.call('HSET', job, 'parts', parts, 'parts_left', parts, 'lease_until', f[5])
redis.call('ZADD', 'kms:open', f[5], id)
unlease(job, id)
return {'split'}
"""
)

COMMITTING: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, commit record
-- Said twice (the answer was lost and the client asked again) it is as if said once.
local ours, state, cancel = held(ARGV[2])
if ours and state == 'committing' and redis.call('HGET', job, 'commit') == ARGV[3] then
  return {'committing'}
end
if not ours or state ~= 'running' then return {'lost'} end
if cancel then return {'cancel'} end
redis.call('HSET', job, 'state', 'committing', 'commit', ARGV[3])
event(job, id, 'committing', '')
return {'committing'}
"""
)

FINISH: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, state, code, keep_s, field, value, ...
if not held(ARGV[2]) then return {'lost'} end
if #ARGV > 5 then redis.call('HSET', job, unpack(ARGV, 6)) end
finish(ARGV[3], ARGV[4], tonumber(ARGV[5]))
return {'finished'}
"""
)

DEFER: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, delay_s, 1 if the attempt does not count
local ours, state = held(ARGV[2])
if not ours or state ~= 'running' then return {'lost'} end
local at = now + tonumber(ARGV[3])
redis.call('HINCRBY', job, 'attempt', -tonumber(ARGV[4]))
redis.call('HINCRBY', job, 'deferrals', 1)
redis.call('HSET', job, 'state', 'queued', 'lease_until', 0, 'not_before', at)
redis.call('ZADD', 'kms:open', at, id)
unlease(job, id)
event(job, id, 'queued', 'deferred')
return {'deferred'}
"""
)

CANCEL: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, keep_s
local state = redis.call('HGET', job, 'state')
if not state then return {'gone'} end
if state == 'queued' then
  redis.call('HINCRBY', job, 'fence', 1)
  finish('cancelled', 'cancelled', tonumber(ARGV[2]))
  return {'cancelled'}
end
if state == 'running' then redis.call('HSET', job, 'cancel', 1) end
return {state}
"""
)

RETRY: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, expires_at
local f = redis.call('HMGET', job, 'state', 'error')
if f[1] ~= 'failed' or f[2] ~= 'attempts_exhausted' then return {'not dead'} end
redis.call('HSET', job, 'state', 'queued', 'error', '', 'attempt', 0, 'not_before', 0, 'expires_at', ARGV[2])
redis.call('HINCRBY', job, 'fence', 1)
redis.call('PERSIST', job)
redis.call('ZREM', 'kms:dead', id)
redis.call('ZREM', 'kms:ended', id)
redis.call('ZADD', 'kms:open', now, id)
event(job, id, 'queued', 'retried')
return {'queued'}
"""
)

REAP: Final = (
    _LIBRARY
    + """
-- KEYS: job   ARGV: id, seconds until the next look
-- A job whose lease ran out goes back to the queue; a committing one stays, for any worker to finish.
local f = redis.call('HMGET', job, 'state', 'lease_until')
if not f[1] then redis.call('ZREM', 'kms:open', id); return {'gone'} end
if f[1] ~= 'queued' and tonumber(f[2] or 0) > now then
  redis.call('ZADD', 'kms:open', f[2], id); return {'leased'}
end
redis.call('ZADD', 'kms:open', now + tonumber(ARGV[2]), id)
if f[1] == 'running' then
  redis.call('HSET', job, 'state', 'queued', 'lease_until', 0, 'not_before', 0)
  unlease(job, id)
  event(job, id, 'queued', 'lease_lost')
  return {'requeued'}
end
return {f[1]}
"""
)
