"""The Lua scripts of jobs in parts, and of lists that must not grow for ever; see ``scripts``."""

from typing import Final

from kms_core.jobs.store.scripts import LIBRARY

SPLIT: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, signed split, then of each part: id, sealed record, items, bytes, bytes that
--   it reads
-- The job becomes the whole of its parts: it runs without a lease until the last of them ends. Parts of an
-- earlier generation begin anew, under a fence that none of their attempts has.
local ours, state, cancel = held(ARGV[2])
if not ours or state ~= 'running' then return {'lost'} end
if redis.call('HEXISTS', job, 'parts') == 1 then return {'split'} end  -- said twice
if cancel then return {'cancel'} end
local f = redis.call('HMGET', job, 'tenant', 'kind', 'queue', 'created_at', 'expires_at', 'priority')
for i = 1, 5 do f[i] = f[i] or '' end
local expires = number(f[5])
local parts, items, bytes = 0, 0, 0
for i = 4, #ARGV, 5 do
  local fence = redis.call('HGET', 'kms:job:' .. ARGV[i], 'fence')
  if fence then
    redis.call('DEL', 'kms:job:' .. ARGV[i])
    redis.call('HSET', 'kms:job:' .. ARGV[i], 'fence', number(fence) + 1)
    redis.call('ZREM', 'kms:ended', ARGV[i])
  end
  redis.call('HSET', 'kms:job:' .. ARGV[i], 'state', 'queued', 'sealed', ARGV[i + 1], 'items', ARGV[i + 2],
    'bytes', ARGV[i + 3], 'work_bytes', ARGV[i + 4], 'tenant', f[1], 'kind', f[2], 'queue', f[3],
    'created_at', f[4], 'expires_at', f[5], 'priority', f[6] or 'normal', 'asked', now, 'parent', id)
  redis.call('ZADD', 'kms:open', now + 10, ARGV[i])
  parts, items, bytes = parts + 1, items + ARGV[i + 2], bytes + ARGV[i + 3]
end
redis.call('HSET', job, 'split', ARGV[3], 'parts', parts, 'parts_left', parts, 'lease_until', expires,
  'items', string.format('%.0f', items), 'bytes', string.format('%.0f', bytes))
redis.call('ZADD', 'kms:open', expires, id)
release(f[1], id)
return {'split'}
"""
)

END_PARENT: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, state, code, keep_s, field, value, ...
-- Ends a job whose parts have all ended; said twice, or by two workers, it is as if said once.
local f = redis.call('HMGET', job, 'state', 'fence', 'cancel')
if f[1] ~= 'running' and f[1] ~= 'queued' then return {'ended'} end
if f[2] ~= ARGV[2] or not parts_ended(job) then return {'lost'} end
if f[3] == '1' then finish('cancelled', 'cancelled', tonumber(ARGV[5])); return {'cancelled'} end
redis.call('HSET', job, unpack(ARGV, 6))
finish(ARGV[3], ARGV[4], tonumber(ARGV[5]))
return {'finished'}
"""
)

STEP: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, log, field, value, ...
-- How far a part over many files has come. Attempts and deferrals are counted since it last came further.
local ours, state, cancel = held(ARGV[2])
if not ours or state ~= 'running' then return {'lost'} end
if cancel then return {'cancel'} end
if redis.call('HGET', job, 'log') == ARGV[3] then return {'stepped'} end
redis.call('HSET', job, 'log', ARGV[3], 'attempt', 1, 'deferrals', 0, unpack(ARGV, 4))
return {'stepped'}
"""
)

PACE: Final = (
    LIBRARY
    + """
-- KEYS: job, the pace of the whole   ARGV: id, files wanted, files a second
-- Answers how many files may be begun, and else in how many seconds: then they are this job's.
local granted = number(redis.call('HGET', job, 'granted'))
if granted > 0 then
  redis.call('HSET', job, 'granted', 0)
  return {'go', granted, '0'}
end
local begin = math.max(now, number(redis.call('GET', KEYS[2])))
local following = begin + ARGV[2] / ARGV[3]
redis.call('SET', KEYS[2], string.format('%.6f', following), 'EX', math.ceil(following - now) + 1)
if begin <= now then return {'go', ARGV[2], '0'} end
redis.call('HSET', job, 'granted', ARGV[2])
return {'wait', 0, tostring(begin - now)}
"""
)

TRIM: Final = """
-- KEYS: a list of jobs, the tenants   ARGV: the rank to begin at, how many to look at, whose list it is
-- Answers where to go on; 0 means that the end was reached.
local ids = redis.call('ZRANGE', KEYS[1], ARGV[1], ARGV[1] + ARGV[2] - 1)
local following = tonumber(ARGV[1])
for _, name in ipairs(ids) do
  if redis.call('EXISTS', 'kms:job:' .. name) == 1 then following = following + 1
  else redis.call('ZREM', KEYS[1], name) end
end
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[2], ARGV[3]) end
if #ids < tonumber(ARGV[2]) then following = 0 end
return {following}
"""

NAMES: Final = ("SPLIT", "END_PARENT", "STEP", "PACE", "TRIM")
