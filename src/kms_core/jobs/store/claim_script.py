"""The Lua script by which a worker claims a job, or lets a large one wait; see ``scripts``."""

from typing import Final

from kms_core.jobs.store.scripts import LIBRARY

CLAIM: Final = (
    LIBRARY
    + """
-- KEYS: job, busy sign of the worker
-- ARGV: id, worker, lease_s, max attempts, keep_s, most leases of a tenant, bytes that make a job large,
--   most large jobs on this worker (0: any)
-- A large job that may not run now waits, and is looked at again the later the more of its tenant's wait
-- before it, so that a thousand of them cost some messages a second.
local name = string.match(ARGV[2], '^[^/]*')
local begun, refused = 'kms:large-begun:' .. name, 'kms:large-refused:' .. name

-- Whether large jobs hold all processes that they may, or it is the turn of another tenant: of those that
-- were refused lately (they ask again every few seconds), the one that has begun none for the longest time.
local function must_wait(tenant)
  local held = large_leases(name)
  redis.call('ZREMRANGEBYSCORE', held, 0, now)
  if redis.call('ZCARD', held) >= tonumber(ARGV[8]) then return true end
  local mine = number(redis.call('ZSCORE', begun, tenant))
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', refused, now - 10, '+inf')) do
    if other ~= tenant and number(redis.call('ZSCORE', begun, other)) < mine then return true end
  end
  return false
end

local function wait(tenant)
  local waiting = large_waiting(tenant)
  local is_new = redis.call('ZADD', waiting, 'NX', now, id)
  redis.call('EXPIRE', waiting, 86400)
  redis.call('ZADD', refused, now, tenant)
  redis.call('EXPIRE', refused, 3600)
  local before = redis.call('ZCOUNT', waiting, '-inf', '(' .. redis.call('ZSCORE', waiting, id))
  local at = now + 1 + before / 10
  release(tenant, id)
  redis.call('HSET', job, 'state', 'queued', 'lease_until', 0, 'not_before', at, 'owed', 1)
  redis.call('ZADD', 'kms:open', at, id)
  return {'waits', is_new}
end

local function begin(tenant, lease_until)
  redis.call('ZREM', large_waiting(tenant), id)
  redis.call('ZREM', refused, tenant)
  redis.call('ZADD', begun, now, tenant)
  redis.call('EXPIRE', begun, 3600)
  redis.call('ZADD', large_leases(name), lease_until, id)
  redis.call('EXPIRE', large_leases(name), 3600)
end

redis.call('SET', KEYS[2], now, 'EX', 3600)
local f = redis.call('HMGET', job, 'state', 'lease_until', 'not_before', 'cancel', 'expires_at',
  'attempt', 'fence', 'sealed', 'commit', 'created_at', 'deferrals', 'tenant', 'parent', 'log',
  'work_bytes')
local state = f[1]
if not state then return {'gone'} end
if state ~= 'queued' and state ~= 'running' and state ~= 'committing' then return {'ended'} end
if parts_ended(job) then return {'parts_ended'} end
if state ~= 'queued' and number(f[2]) > now then return {'leased'} end
if state == 'queued' and number(f[3]) > now then return {'early'} end
local fence, attempt = number(f[7]), number(f[6])
for _, found in ipairs({ fence, attempt }) do
  if found < 0 or found > 2147483648 or found % 1 ~= 0 then  -- which no script of ours came to
    redis.call('HSET', job, 'fence', 1, 'attempt', 0)
    finish('failed', 'record_refused', tonumber(ARGV[5]))
    return {'closed', 'failed', 'record_refused'}
  end
end
fence = fence + 1
local is_large = number(f[15]) >= tonumber(ARGV[7])
if state ~= 'committing' then
  local code, final = '', 'failed'
  if f[4] == '1' or stopped_whole(f[13]) then code, final = 'cancelled', 'cancelled'
  elseif number(f[5]) <= now then code = 'expired'
  elseif attempt >= tonumber(ARGV[4]) then code = 'attempts_exhausted' end
  if code ~= '' then
    redis.call('HSET', job, 'fence', fence)
    finish(final, code, tonumber(ARGV[5]))
    return {'closed', final, code}
  end
  redis.call('ZREMRANGEBYSCORE', leases(f[12]), 0, now)
  if redis.call('ZCARD', leases(f[12])) >= tonumber(ARGV[6]) then
    redis.call('ZADD', 'kms:open', now + 1, id)
    return {'capped'}
  end
  if is_large and tonumber(ARGV[8]) > 0 and must_wait(f[12] or '') then return wait(f[12] or '') end
  attempt = attempt + 1
end
local lease_until = now + tonumber(ARGV[3])
local taken = { 'fence', fence, 'attempt', attempt, 'lease_until', lease_until, 'worker', ARGV[2] }
if state == 'committing' then redis.call('HSET', job, unpack(taken))
else redis.call('HSET', job, 'state', 'running', 'bytes_done', 0, 'items_done', 0, 'items_failed', 0,
  unpack(taken)) end
redis.call('ZADD', 'kms:open', lease_until, id)
redis.call('ZADD', leases(f[12]), lease_until, id)
if is_large then begin(f[12] or '', lease_until) end
if state ~= 'committing' then event(facts(job), id, 'running', '') end
return {'claimed', fence, attempt, f[8], state == 'committing' and f[9] or '',
  tostring(now - number(f[10])), f[11] or 0, f[14] or '', is_large and 1 or 0}
"""
)

NAMES: Final = ("CLAIM",)
