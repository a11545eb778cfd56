"""The Lua scripts that change a job's state: each compares and sets in one step, on the server's clock.

Every script gets the job's hash as its first key and its id as its first argument, and answers a list
whose first element is a word. Shared sets: ``open`` (jobs that have not ended, by when to look next),
``open:<t>`` and ``spooled:<t>`` (those of a tenant by expiry, and their sizes, for its quotas),
``ended`` (results by expiry), ``dead`` (dead letters), ``tenant:<t>`` (its jobs by age), ``tenants``,
``running:<t>`` (its leases), ``events`` (a stream with one record per transition). Of large jobs:
``large:<w>`` (their leases on a worker), ``large-begun:<w>`` (tenants by when they last began one there),
``large-refused:<w>`` (tenants by when one of theirs last had to wait there), ``large-waiting:<t>`` (those of
a tenant that wait, by age).

Fields that a script of ours always writes may be missing or junk all the same: others may have Redis.
"""

from typing import Final

LIBRARY: Final = """
local server = redis
local redis = { pcall = server.pcall }

-- redis.call of all scripts of jobs. A key of a wrong type, or a sum that is no number, was written by
-- others, and what stood there is lost: it is deleted. A script that stops halfway leaves jobs half done.
function redis.call(...)
  local answer, _, key, field = server.pcall(...), ...
  if type(answer) ~= 'table' or not answer.err then return answer end
  if string.find(answer.err, 'WRONGTYPE') then
    server.call('DEL', key)
    server.log(server.LOG_WARNING, 'kms: deleted a key of a wrong type: ' .. key)
  elseif string.find(answer.err, 'hash value is not') or string.find(answer.err, 'overflow') then
    server.call('HDEL', key, field)
  end
  return server.call(...)  -- raises any other error
end

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local job, id = KEYS[1], ARGV[1]

local function number(text)
  local found = tonumber(text) or 0
  return math.abs(found) <= 9007199254740992 and found or 0  -- which NaN is not
end

-- HINCRBY fails where a field is no integer, which would end a script halfway: such a field counts as 0.
local function add(key, field, more)
  local sum = number(redis.call('HGET', key, field)) + number(more)
  redis.call('HSET', key, field, string.format('%.0f', sum))
  return sum
end

local function facts(key)
  return redis.call('HMGET', key, 'tenant', 'kind', 'fence', 'attempt', 'parent', 'expires_at')
end

local function event(f, name, state, code)
  if f[5] then return end  -- of a job in parts, only the whole is told
  local fields = { 'specversion', '1.0',
    'type', 'kms.job.' .. state, 'source', '/api/v1/kms/jobs', 'subject', name,
    'id', name .. '.' .. (f[3] or '0') .. '.' .. state .. '.' .. clock[1] .. clock[2], 'time', tostring(now),
    'tenant', f[1] or '', 'kind', f[2] or '', 'attempt', f[4] or '0', 'code', code }
  local function add()
    local answer = redis.pcall('XADD', 'kms:events', 'MAXLEN', '~', 100000, '*', unpack(fields))
    return type(answer) == 'table' and answer.err or ''
  end
  -- A script must not stop halfway because of its event. What is no stream, or one whose ids are used up,
  -- was not made by a script of ours, and takes no event ever again: it goes.
  local failed = add()
  if string.find(failed, 'WRONGTYPE') or string.find(failed, 'exhausted') then
    redis.call('DEL', 'kms:events')
    add()
  end
end

local function leases(tenant)
  return 'kms:running:' .. (tenant or '')
end

local function large_leases(worker)  -- of a worker, whose name ends before the pid of its child
  return 'kms:large:' .. string.match(worker or '', '^[^/]*')
end

local function large_waiting(tenant)
  return 'kms:large-waiting:' .. (tenant or '')
end

local function release(tenant, name)  -- the lease of a job is over
  redis.call('ZREM', leases(tenant), name)
  redis.call('ZREM', large_leases(redis.call('HGET', 'kms:job:' .. name, 'worker')), name)
end

local function quota(tenant)  -- the open jobs of a tenant by expiry, without their parts
  return 'kms:open:' .. (tenant or '')
end

-- What a job was accepted with rests in the spool no more: it counts no longer for its tenant's quota.
local function unspool(tenant, name)
  local spooled = 'kms:spooled:' .. (tenant or '')
  local size = redis.call('HGET', spooled, name)
  if not size then return end
  redis.call('HDEL', spooled, name)
  add(spooled, 'sum', -number(size))
end

local function close(key, name, state, code, keep_s)
  redis.call('HSET', key, 'state', state, 'error', code, 'lease_until', 0, 'ended_at', now)
  local f = facts(key)
  redis.call('ZREM', 'kms:open', name)
  redis.call('ZREM', quota(f[1]), name)
  local kept = { [''] = true, items_failed = true, attempts_exhausted = true, record_refused = true }
  if not kept[code] then unspool(f[1], name) end
  release(f[1], name)
  redis.call('ZREM', large_waiting(f[1]), name)
  local expires = number(f[6])
  if expires <= 0 then expires = now end
  redis.call('ZADD', 'kms:ended', expires, name)
  redis.call('EXPIREAT', key, math.floor(expires + keep_s))
  event(f, name, state, code)
  return f[5]
end

-- A part that ends counts for the whole, for its progress: of a part that was given up, what it had settled
-- well still counts. After the last one a worker verifies the ends of all and ends the whole (END_PARENT);
-- if it dies, REAP sends for another.
local function count(parent, state, code)
  local whole = 'kms:job:' .. parent
  if redis.call('HGET', whole, 'state') ~= 'running' then return end
  local f = redis.call('HMGET', job, 'items', 'items_failed', 'bytes', 'settled')
  local failed = number(f[1]) - number(f[4])
  if state == 'succeeded' or code == 'items_failed' then failed = f[2] or 0 end
  add(whole, 'items_done', f[1])
  add(whole, 'items_failed', failed)
  add(whole, 'bytes_done', f[3])
  local all = redis.call('HGETALL', job)
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 6) == 'tally:' then add(whole, all[i], all[i + 1]) end
  end
  if add(whole, 'parts_left', -1) > 0 then return end
  redis.call('HSET', whole, 'lease_until', now + 5)
  redis.call('ZADD', 'kms:open', now + 5, parent)
end

local function finish(state, code, keep_s)
  local parent = close(job, id, state, code, keep_s)
  if parent then count(parent, state, code)
  elseif code == 'attempts_exhausted' or code == 'record_refused' then
    redis.call('ZADD', 'kms:dead', now, id)
  end
end

local function parts_ended(key)
  local f = redis.call('HMGET', key, 'parts', 'parts_left')
  return f[1] and number(f[2]) <= 0
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
    LIBRARY
    + """
-- KEYS: job, tenant list, idempotency (optional)
-- ARGV: id, most open jobs, idempotency value, expires_at, created_at, tenant, most of the tenant (0: any),
--   bytes in the spool, most of the tenant (0: any), the broker's list or '', the message, field, value, ...
if KEYS[3] then
  local before = redis.call('GET', KEYS[3])
  if before then return {'exists', before} end
end
if redis.call('EXISTS', job) == 1 then return {'taken'} end
if redis.call('ZCARD', 'kms:open') >= tonumber(ARGV[2]) then return {'full'} end
redis.call('ZREMRANGEBYSCORE', quota(ARGV[6]), 0, now)
local most = tonumber(ARGV[7])
if most > 0 and redis.call('ZCARD', quota(ARGV[6])) >= most then return {'quota'} end
local size, most_bytes, spooled = tonumber(ARGV[8]), tonumber(ARGV[9]), 'kms:spooled:' .. ARGV[6]
if most_bytes > 0 and size > 0 then
  if number(redis.call('HGET', spooled, 'sum')) + size > most_bytes then return {'spool'} end
  redis.call('HSET', spooled, id, size)
  add(spooled, 'sum', size)
end
if KEYS[3] then redis.call('SET', KEYS[3], ARGV[3], 'EXAT', math.floor(tonumber(ARGV[4]))) end
redis.call('HSET', job, 'state', 'queued', unpack(ARGV, 12))
redis.call('ZADD', quota(ARGV[6]), ARGV[4], id)
redis.call('ZADD', 'kms:open', now, id)
redis.call('ZADD', KEYS[2], ARGV[5], id)
redis.call('SADD', 'kms:tenants', ARGV[6])
event(facts(job), id, 'queued', '')
if ARGV[10] ~= '' then redis.call('LPUSH', ARGV[10], ARGV[11]) end
return {'queued'}
"""
)

RENEW: Final = (
    LIBRARY
    + """
-- KEYS: job, busy sign of the worker   ARGV: id, fence, lease_s, field, value, ...
local ours, _, cancel = held(ARGV[2])
if not ours then return {'lost'} end
if redis.call('HEXISTS', job, 'parts') == 1 then return {'held'} end  -- late: it runs without a lease by now
local lease_until = now + tonumber(ARGV[3])
redis.call('SET', KEYS[2], now, 'EX', 3600)
redis.call('HSET', job, 'lease_until', lease_until, unpack(ARGV, 4))
redis.call('ZADD', 'kms:open', lease_until, id)
local f = redis.call('HMGET', job, 'tenant', 'worker')
redis.call('ZADD', leases(f[1]), lease_until, id)
if redis.call('ZSCORE', large_leases(f[2]), id) then
  redis.call('ZADD', large_leases(f[2]), lease_until, id)
  redis.call('EXPIRE', large_leases(f[2]), 3600)
end
return {cancel and 'cancel' or 'held'}
"""
)

COMMITTING: Final = (
    LIBRARY
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
event(facts(job), id, 'committing', '')
return {'committing'}
"""
)

FINISH: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, state, code, keep_s, field, value, ...
if not held(ARGV[2]) then return {'lost'} end
if #ARGV > 5 then redis.call('HSET', job, unpack(ARGV, 6)) end
finish(ARGV[3], ARGV[4], tonumber(ARGV[5]))
return {'finished'}
"""
)

DEFER: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, fence, delay_s, 1 if the attempt does not count, 1 if something was away,
--   the bytes that it turned out to read, or ''
local ours, state = held(ARGV[2])
if not ours or state ~= 'running' then return {'lost'} end
local at = now + tonumber(ARGV[3])
add(job, 'attempt', -tonumber(ARGV[4]))
add(job, 'deferrals', ARGV[5])
redis.call('HSET', job, 'state', 'queued', 'lease_until', 0, 'not_before', at, 'owed', 1)
if ARGV[6] ~= '' then redis.call('HSET', job, 'work_bytes', ARGV[6]) end
redis.call('ZADD', 'kms:open', at, id)
release(redis.call('HGET', job, 'tenant'), id)
event(facts(job), id, 'queued', 'deferred')
return {'deferred'}
"""
)

CANCEL: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, sealed record of the job that is meant, keep_s, ids of its parts
-- Parts that wait for their time need wait no longer: whoever looks at them next ends them.
local state = redis.call('HGET', job, 'state')
if not state or (redis.call('HGET', job, 'sealed') or '') ~= ARGV[2] then return {'gone'} end
if state == 'queued' then
  add(job, 'fence', 1)
  finish('cancelled', 'cancelled', tonumber(ARGV[3]))
  return {'cancelled'}
end
if state == 'running' then redis.call('HSET', job, 'cancel', 1) end
for i = 4, #ARGV do
  local f = redis.call('HMGET', 'kms:job:' .. ARGV[i], 'state', 'not_before')
  if f[1] == 'queued' and number(f[2]) > now then
    redis.call('HSET', 'kms:job:' .. ARGV[i], 'not_before', 0, 'owed', 1)
    redis.call('ZADD', 'kms:open', now, ARGV[i])
  end
end
return {state}
"""
)

RETRY: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, sealed record of the job that is meant, expires_at, new sealed record, the fence of
--   an end that was found unproven, or '', tenant
-- A job that was cut into parts is cut anew.
local f = redis.call('HMGET', job, 'state', 'error', 'sealed', 'fence')
local dead = f[1] == 'failed' and (f[2] == 'attempts_exhausted' or f[2] == 'record_refused')
local signs = f[1] == 'succeeded' or (f[1] == 'failed' and f[2] == 'items_failed')
local unproven = signs and ARGV[5] == (f[4] or '0')
if f[3] ~= ARGV[2] or not (dead or unproven) then return {'not dead'} end
for _, name in ipairs(redis.call('HKEYS', job)) do
  if string.sub(name, 1, 6) == 'tally:' then redis.call('HDEL', job, name) end
end
redis.call('HDEL', job, 'parts', 'parts_left', 'split', 'end', 'cancel', 'purged')
redis.call('HSET', job, 'state', 'queued', 'error', '', 'attempt', 0, 'not_before', 0, 'asked', now,
  'expires_at', ARGV[3], 'sealed', ARGV[4], 'tenant', ARGV[6])
add(job, 'fence', 1)
redis.call('PERSIST', job)
redis.call('ZREM', 'kms:dead', id)
redis.call('ZREM', 'kms:ended', id)
redis.call('ZADD', 'kms:open', now, id)
redis.call('ZADD', quota(ARGV[6]), ARGV[3], id)
event(facts(job), id, 'queued', 'retried')
return {'queued'}
"""
)

REAP: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id, seconds until the next look, then lanes ('<queue> <priority>') and since when the
--   oldest message of each waits
-- A job whose lease ran out goes back to the queue; a committing one stays, for any worker to finish.
-- The answer is a word and, of a job that may want a message, its queue and priority: so does one whose
-- parts have all ended, but which nobody has ended.
-- A deferred job has used up its message: it is owed one when its time has come. The message of one that was
-- asked for before the oldest in its lane was lost: lanes are queues.
local f = redis.call('HMGET', job, 'state', 'lease_until', 'queue', 'priority', 'asked', 'created_at')
if not f[1] then redis.call('ZREM', 'kms:open', id); return {'gone'} end
if f[1] ~= 'queued' and number(f[2]) > now then
  redis.call('ZADD', 'kms:open', number(f[2]), id); return {'leased'}
end
if f[1] ~= 'queued' and f[1] ~= 'running' and f[1] ~= 'committing' then  -- ended since it was seen as due
  redis.call('ZREM', 'kms:open', id); return {f[1]}
end
redis.call('ZADD', 'kms:open', now + tonumber(ARGV[2]), id)
if parts_ended(job) then return {'parts_ended', f[3], f[4]} end
if f[1] == 'running' then
  redis.call('HSET', job, 'state', 'queued', 'lease_until', 0, 'not_before', 0, 'asked', now)
  release(redis.call('HGET', job, 'tenant'), id)
  event(facts(job), id, 'queued', 'lease_lost')
  return {'requeued', f[3], f[4]}
end
local word = f[1]
if word == 'queued' and redis.call('HDEL', job, 'owed') == 1 then word = 'due' end
local lane, asked = (f[3] or '') .. ' ' .. (f[4] or ''), math.max(number(f[5]), number(f[6]))
for i = 3, #ARGV, 2 do
  local oldest = tonumber(ARGV[i + 1])
  if word == 'queued' and ARGV[i] == lane and asked + 5 < oldest and oldest <= now then word = 'lost' end
end
if word == 'due' or word == 'lost' then redis.call('HSET', job, 'asked', now) end
return {word, f[3], f[4]}
"""
)

PURGED: Final = (
    LIBRARY
    + """
-- KEYS: job   ARGV: id
local fence = redis.call('HGET', job, 'fence')
if fence then redis.call('HSET', job, 'purged', 1) end
unspool(redis.call('HGET', job, 'tenant'), id)
redis.call('ZREM', 'kms:ended', id)
return {fence or '0'}
"""
)

NAMES: Final = (
    "SUBMIT",
    "RENEW",
    "COMMITTING",
    "FINISH",
    "DEFER",
    "CANCEL",
    "RETRY",
    "REAP",
    "PURGED",
)
