"""The Lua scripts that change a job's state: each compares and sets in one step, on the server's clock.

Keys of a job: ``job`` is its hash, ``open`` the ZSET of jobs that have not ended (score: when to look at
it next), ``ended`` the ZSET of results by expiry. Every script answers a list whose first element is a
word.
"""

from typing import Final

_NOW: Final = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
"""

_END: Final = """
local function finish(job, open, ended, id, state, code, keep_s)
  redis.call('HSET', job, 'state', state, 'error', code, 'lease_until', 0, 'ended_at', now)
  redis.call('ZREM', open, id)
  local expires = tonumber(redis.call('HGET', job, 'expires_at'))
  redis.call('ZADD', ended, expires, id)
  redis.call('EXPIREAT', job, math.floor(expires + keep_s))
end
"""

SUBMIT: Final = """
-- KEYS: job, open, tenant list, idempotency (optional)
-- ARGV: id, idempotency value, expires_at, created_at, field, value, ...
if KEYS[4] then
  local before = redis.call('GET', KEYS[4])
  if before then return {'exists', before} end
  redis.call('SET', KEYS[4], ARGV[2], 'EXAT', math.floor(tonumber(ARGV[3])))
end
if redis.call('EXISTS', KEYS[1]) == 1 then return {'taken'} end
redis.call('HSET', KEYS[1], 'state', 'queued', unpack(ARGV, 5))
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
return {'queued'}
"""

CLAIM: Final = (
    _NOW
    + _END
    + """
-- KEYS: job, open, ended   ARGV: id, worker, lease_s, max attempts, keep_s
local job = redis.call('HMGET', KEYS[1], 'state', 'lease_until', 'not_before', 'cancel', 'expires_at',
  'attempt', 'fence', 'sealed', 'commit', 'created_at', 'deferrals')
local state = job[1]
if not state then return {'gone'} end
if state ~= 'queued' and state ~= 'running' and state ~= 'committing' then return {'ended'} end
if state ~= 'queued' and tonumber(job[2] or 0) > now then return {'leased'} end
if state == 'queued' and tonumber(job[3] or 0) > now then return {'early'} end
local fence = tonumber(job[7] or 0) + 1
local attempt = tonumber(job[6] or 0)
if state ~= 'committing' then
  local code, final = '', 'failed'
  if job[4] == '1' then code, final = 'cancelled', 'cancelled'
  elseif tonumber(job[5]) <= now then code = 'expired'
  elseif attempt >= tonumber(ARGV[4]) then code = 'attempts_exhausted' end
  if code ~= '' then
    redis.call('HSET', KEYS[1], 'fence', fence)
    finish(KEYS[1], KEYS[2], KEYS[3], ARGV[1], final, code, tonumber(ARGV[5]))
    return {'closed', final, code}
  end
  attempt = attempt + 1
  redis.call('HSET', KEYS[1], 'state', 'running', 'bytes_done', 0, 'items_done', 0, 'items_failed', 0)
end
local lease_until = now + tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'fence', fence, 'attempt', attempt, 'lease_until', lease_until,
  'worker', ARGV[2])
redis.call('ZADD', KEYS[2], lease_until, ARGV[1])
return {'claimed', fence, attempt, job[8], state == 'committing' and job[9] or '',
  tostring(now - tonumber(job[10])), job[11] or 0}
"""
)

RENEW: Final = (
    _NOW
    + """
-- KEYS: job, open   ARGV: id, fence, lease_s, field, value, ...
local job = redis.call('HMGET', KEYS[1], 'state', 'fence', 'cancel')
if (job[1] ~= 'running' and job[1] ~= 'committing') or job[2] ~= ARGV[2] then return {'lost'} end
local lease_until = now + tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'lease_until', lease_until, unpack(ARGV, 4))
redis.call('ZADD', KEYS[2], lease_until, ARGV[1])
return {job[3] == '1' and 'cancel' or 'held'}
"""
)

COMMITTING: Final = """
-- KEYS: job   ARGV: fence, commit record
local job = redis.call('HMGET', KEYS[1], 'state', 'fence', 'cancel')
if job[1] ~= 'running' or job[2] ~= ARGV[1] then return {'lost'} end
if job[3] == '1' then return {'cancel'} end
redis.call('HSET', KEYS[1], 'state', 'committing', 'commit', ARGV[2])
return {'committing'}
"""

FINISH: Final = (
    _NOW
    + _END
    + """
-- KEYS: job, open, ended   ARGV: id, fence, state, code, keep_s, field, value, ...
local job = redis.call('HMGET', KEYS[1], 'state', 'fence')
if (job[1] ~= 'running' and job[1] ~= 'committing') or job[2] ~= ARGV[2] then return {'lost'} end
if #ARGV > 5 then redis.call('HSET', KEYS[1], unpack(ARGV, 6)) end
finish(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[3], ARGV[4], tonumber(ARGV[5]))
return {'finished'}
"""
)

DEFER: Final = (
    _NOW
    + """
-- KEYS: job, open   ARGV: id, fence, delay_s, 1 if the attempt does not count
local job = redis.call('HMGET', KEYS[1], 'state', 'fence', 'attempt', 'deferrals')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return {'lost'} end
local at = now + tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'state', 'queued', 'lease_until', 0, 'not_before', at,
  'attempt', tonumber(job[3]) - tonumber(ARGV[4]), 'deferrals', tonumber(job[4] or 0) + 1)
redis.call('ZADD', KEYS[2], at, ARGV[1])
return {'deferred'}
"""
)

CANCEL: Final = (
    _NOW
    + _END
    + """
-- KEYS: job, open, ended   ARGV: id, keep_s
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return {'gone'} end
if state == 'queued' then
  redis.call('HINCRBY', KEYS[1], 'fence', 1)
  finish(KEYS[1], KEYS[2], KEYS[3], ARGV[1], 'cancelled', 'cancelled', tonumber(ARGV[2]))
  return {'cancelled'}
end
if state == 'running' then redis.call('HSET', KEYS[1], 'cancel', 1) end
return {state}
"""
)

REAP: Final = (
    _NOW
    + """
-- KEYS: job, open   ARGV: id, seconds until the next look
-- A job whose lease ran out goes back to the queue; a committing one stays, for any worker to finish.
local job = redis.call('HMGET', KEYS[1], 'state', 'lease_until')
if not job[1] then redis.call('ZREM', KEYS[2], ARGV[1]); return {'gone'} end
if job[1] ~= 'queued' and tonumber(job[2] or 0) > now then
  redis.call('ZADD', KEYS[2], job[2], ARGV[1]); return {'leased'}
end
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
if job[1] == 'running' then
  redis.call('HSET', KEYS[1], 'state', 'queued', 'lease_until', 0, 'not_before', 0)
  return {'requeued'}
end
return {job[1]}
"""
)
