-- Shared by all scripts of jobs. P is the prefix of every key, as the client has it: on a cluster it carries a
-- hash tag, so that all keys are in one slot.
-- `job` and `id` are the first key and argument of a script about one job.
--
-- Sets, besides the record of each job at `job:<id>`:
--   open                        all jobs that have not ended, parts too: the bound of all open jobs
--   open:<t>, spooled:<t>       those of a tenant by expiry, and their sizes, for its quotas
--   held:<t>                    bytes that each job of a tenant takes here until it is forgotten, and its small
--                               blobs (b<id>) until they are deleted; room is the memory that was free last
--   leased                      running and committing jobs by the end of their lease
--   delayed                     queued jobs that may not run yet, by when they may
--   expiring                    queued jobs by their expiry
--   ready:<q>:<t>:<class>       queued jobs that may run, by rank; a class is small or large, and the resources
--   sizes:<q>:<t>               the classes of which a tenant has ready jobs in a queue that may be chosen
--   waiting:<q>:<priority>      ready jobs by since when: depth and age of a queue
--   active:<q>, spent:<q>       tenants with and without ready jobs, by virtual time; floor:<q> is its minimum
--   capped:<t>                  queues in which a tenant waits for one of its own leases to end
--   used:<r>, blocked:<r>       leases of jobs that use a resource; queue, tenant and class of those that wait
--   stalls:<w>, probes:<w>      resources that a worker leaves alone, by until when; its one attempt at each
--   stuck                       processes of each worker that hang
--   group:<digest>              jobs of a group by age; group-open:<digest> those that have not ended
--   state:<t>:<state>           jobs of a tenant by age; tenant:<t> has all of them
--   label:<digest>              jobs with a label by age; the digest is keyed, over tenant, name and value
--   records, lists              ended jobs by when their record expires; the keys of lists that they leave then
--   running:<t>, large:<w>      leases of a tenant, and of large jobs on a worker
--   ended, dead, dead:<t>       results by expiry; dead jobs, and those of a tenant
--   inputs                      ended jobs whose input is still in the spool, by when they ended
--   chores                      jobs that want a worker's hand: to be tidied, or to be ended after their parts
--   slots                       processes of each worker, and the queues that they serve
--   newer                       open jobs that a worker put aside for one of a newer version, by when
--   died:<w>/<pid>              how a process of a worker ended, for a while
--   events                      a stream with one record for each transition
--   operations                  a stream with the sums of all operations, a point a minute for a day
--   webhooks:due:<endpoint>     events for an endpoint by when to send them; webhooks:endpoints names all that have any
--   sessions:<t>                sessions of the pages by age; session:<digest> is the sealed record of one
local P = string.match(KEYS[1], '^{?kms}?:')
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local job, id = KEYS[1], ARGV[1]

local PENALTY_S = { high = 0, normal = 600, low = 3600 }
local SEEN_S = 5  -- a worker that is silent for longer is gone: see WORKER_SEEN_S
local EXPIRY_S = 3  -- in which a worker ends an attempt that runs for too long, before others may

local function number(text) return tonumber(text) or 0 end  -- of a field that may be missing

local function add(key, field, more)
  return redis.call('HINCRBY', key, field, string.format('%d', number(more)))
end

-- Remove members of a set that is by time, those of until then: a thousand at most, in a millisecond, since there
-- may be any number. Answers how many there were.
local function drop(key, until_s)
  local over = redis.call('ZCOUNT', key, '-inf', until_s)
  if over > 0 then redis.call('ZREMRANGEBYRANK', key, 0, math.min(over, 1000) - 1) end
  return over
end

-- The time, and 1 if less than half of the memory is used: small blobs may rest in Redis. Nothing before the memory
-- is used up: what is left is for the broker, and for jobs to run and end. Notes what is free of the memory that
-- jobs may take, or without maxmemory of that of the machine, for the shares of tenants.
-- Memory is looked at twice a second at most, unless `always`.
local function room_for_jobs(full, unbounded, always)
  if always or redis.call('EXISTS', P .. 'probed') == 0 then
    redis.call('SET', P .. 'probed', now, 'PX', 500)
    local memory = redis.call('INFO', 'memory')
    local used, most = string.match(memory, 'used_memory:(%d+)'), number(string.match(memory, 'maxmemory:(%d+)'))
    local limit = most > 0 and most or number(string.match(memory, 'total_system_memory:(%d+)'))
    redis.call('SET', P .. 'room', string.format('%.0f', limit * tonumber(full) - number(used)))
    if most > 0 and number(used) > most * tonumber(full) then
      redis.call('SET', P .. 'full', now, 'PX', 1000)
    end
    if most == 0 then most = tonumber(unbounded) end
    if number(used) > most / 2 then redis.call('SET', P .. 'half', now, 'PX', 15000) end
  end
  if redis.call('EXISTS', P .. 'full') == 1 then return nil end
  return { clock[1], clock[2], 1 - redis.call('EXISTS', P .. 'half') }
end

local FIELDS = { 'state', 'tenant', 'queue', 'priority', 'created_at', 'parent', 'kind', 'generation', 'attempt',
  'expires_at', 'work_bytes', 'labels', 'group', 'start_by', 'run_by', 'keep_for', 'started_at', 'resources',
  'needs', 'callback', 'group_callback', 'attempt_id', 'cancel', 'worker', 'paid_until', 'waits_for', 'spooled' }

-- Fields with the types that transitions go by, and none of those missing that each job has.
local function typed(f)
  f.tenant, f.queue, f.priority = f.tenant or '', f.queue or 'kms.bulk', f.priority or 'normal'
  f.run_by, f.start_by = number(f.run_by), number(f.start_by)
  return f
end

-- The fields of a record that transitions go by.
local function record(key)
  local found, f = redis.call('HMGET', key, unpack(FIELDS)), {}
  for i, name in ipairs(FIELDS) do f[name] = found[i] or nil end
  return typed(f)
end

-- The features that workers of this version know: those of records, and those that a job may name.
local KNOWN = {@KNOWN@}
local RECORD_VERSION = 1

-- What a job needs that this version does not know, from its sealed record and its field; nil if nothing.
-- The first byte of a record is its version, up to 15: other bytes are no record's, and refused as such.
local function lacks(sealed, needs)
  local version = string.byte(sealed or '', 1) or 0
  if version > RECORD_VERSION and version < 16 then return 'record-' .. version end
  for name in string.gmatch(needs or '', '[%w_.-]+') do
    if not KNOWN[name] then return name end
  end
end

-- An end has one id, however often Redis comes to it: after a fail-over a job may end again.
local ENDED = { succeeded = true, failed = true, cancelled = true, ended = true }
local MOST_AGAIN = 1000
-- `what` is job, or group for the end of the group that a job was the last of. An endpoint that the job names gets
-- an entry in its set; what no worker has sent for a week leaves that. While a thousand wait, a job that is queued or
-- begun again (`f.again`) adds none: SUBMIT counts for its tenant what it adds once.
local function event(f, name, state, code, what)
  if f.parent then return end  -- of a job in parts, only the parent is reported
  local generation = string.format('%.0f', number(f.generation))
  local fields = { 'specversion', '1.0',
    'type', 'kms.' .. (what or 'job') .. '.' .. state, 'source', '/api/v1/kms/jobs', 'subject', name,
    'id', name .. '.' .. generation .. '.' .. state .. (ENDED[state] and '' or '.' .. clock[1] .. clock[2]),
    'time', tostring(now), 'tenant', f.tenant, 'kind', f.kind or '', 'attempt', f.attempt or '0',
    'code', code }
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', 100000, '*', unpack(fields))
  local endpoint = what == 'group' and f.group_callback or not what and f.callback
  if not endpoint then return end
  local due = P .. 'webhooks:due:' .. endpoint
  drop(due, now - 604800)
  if not ENDED[state] and (f.again or code ~= '') and redis.call('ZCARD', due) >= MOST_AGAIN then return end
  redis.call('ZADD', due, now, cjson.encode(fields))
  redis.call('SADD', P .. 'webhooks:endpoints', endpoint)
end

-- -- the index by tenant and state ---------------------------------------------------------------------

local function state_key(f, state)
  return P .. 'state:' .. f.tenant .. ':' .. state
end

-- Set the state of a job, in its record and in the index. `f.state` is the one before.
local function become(key, name, f, state, ...)
  redis.call('HSET', key, 'state', state, ...)
  if not f.parent and f.state ~= state then
    if f.state then redis.call('ZREM', state_key(f, f.state), name) end
    redis.call('ZADD', state_key(f, state), number(f.created_at), name)
  end
  f.state = state
end

local function outlive(key, until_s)  -- let a list of jobs live until then, at least
  if now + redis.call('TTL', key) < until_s then redis.call('EXPIREAT', key, math.ceil(until_s)) end
end

-- The group that a job is in, by a keyed digest, and the number of its jobs; nil without one.
local function group_of(f)
  local digest, size = string.match(f.group or '', '^(%x+) (%d+)$')
  return digest, tonumber(size)
end

-- Put an open job into its group, or take one out that has ended. The group ends with its last open job.
local function index_group(name, f, is_open, until_s)
  local digest, size = group_of(f)
  if not digest then return end
  local all, open = P .. 'group:' .. digest, P .. 'group-open:' .. digest
  redis.call('ZADD', all, number(f.created_at), name)
  redis.call(is_open and 'SADD' or 'SREM', open, name)
  outlive(all, until_s)
  outlive(open, until_s)
  return not is_open and redis.call('ZCARD', all) >= size and redis.call('EXISTS', open) == 0
end

-- Take a count of one job out of a hash that has their sum. What was never counted changes nothing.
local function uncount(key, name)
  local size = redis.call('HGET', key, name)
  if not size then return end
  redis.call('HDEL', key, name)
  add(key, 'sum', -number(size))
end

-- Bytes of memory: of a job without its sealed record, fields and blobs; of a part of one; of a list of its own that
-- a job is in. Measured with the default settings of Redis, and rounded up.
local JOB_BYTES, PART_BYTES, LIST_BYTES = 4300, 3500, 250

local function held_key(tenant) return P .. 'held:' .. (tenant or '') end

-- Count bytes of memory that a job takes.
local function hold(tenant, name, bytes)
  add(held_key(tenant), name, bytes)
  add(held_key(tenant), 'sum', bytes)
end

-- Note the lists that a job is in until its record expires (FORGET).
local function note_lists(name, f, until_s)
  local keys = { P .. 'tenant:' .. f.tenant, state_key(f, f.state), P .. 'dead', P .. 'dead:' .. f.tenant }
  for digest in string.gmatch(f.labels or '', '%x+') do table.insert(keys, P .. 'label:' .. digest) end
  redis.call('ZADD', P .. 'records', until_s, name)
  redis.call('HSET', P .. 'lists', name, table.concat(keys, ' '))
end

-- Take a job out of those lists, and out of the counts of its tenant.
local function forget(name, tenant)
  uncount(held_key(tenant), name)
  uncount(held_key(tenant), 'b' .. name)
  uncount(P .. 'spooled:' .. (tenant or ''), name)  -- of a result that was not deleted before its record expired
  for key in string.gmatch(redis.call('HGET', P .. 'lists', name) or '', '%S+') do redis.call('ZREM', key, name) end
  redis.call('HDEL', P .. 'lists', name)
  redis.call('ZREM', P .. 'records', name)
end

-- -- terms ---------------------------------------------------------------------------------------------

-- The time at which a queued job expires: it must start in time, and end in time once it has started.
local function waits_until(f)
  return number(f.started_at) > 0 and f.run_by or math.min(f.start_by, f.run_by)
end

-- Why a job may not be worked on any more; nil if it may.
local function expiry(f)
  if f.run_by <= now then return 'expired' end
  if number(f.started_at) <= 0 and f.start_by <= now then return 'not_started' end
end

-- The end of a lease from now on: soon after the time by which the job must have ended.
local function lease_end(f, lease_s)
  return math.min(now + lease_s, math.max(now, f.run_by) + EXPIRY_S)
end

-- -- the choice of the next job ------------------------------------------------------------------------

local function active_key(queue) return P .. 'active:' .. queue end
local function spent_key(queue) return P .. 'spent:' .. queue end
local function sizes_key(queue, tenant) return P .. 'sizes:' .. queue .. ':' .. tenant end
local function ready_key(queue, tenant, size) return P .. 'ready:' .. queue .. ':' .. tenant .. ':' .. size end
local function waiting_key(f) return P .. 'waiting:' .. f.queue .. ':' .. f.priority end
local function leases_key(tenant) return P .. 'running:' .. (tenant or '') end
local function capped_key(tenant) return P .. 'capped:' .. tenant end

-- A tenant that becomes active starts at its own virtual time, but not before the least active one.
local function activate(queue, tenant)
  local active = active_key(queue)
  if redis.call('ZSCORE', active, tenant) then return end
  local own = number(redis.call('ZSCORE', spent_key(queue), tenant))
  local least = redis.call('ZRANGE', active, 0, 0, 'WITHSCORES')
  local floor = number(redis.call('GET', P .. 'floor:' .. queue))
  redis.call('ZADD', active, math.max(own, floor, number(least[2])), tenant)
  redis.call('ZREM', spent_key(queue), tenant)
end

local function deactivate(queue, tenant)
  local at = redis.call('ZSCORE', active_key(queue), tenant)
  if not at then return end
  redis.call('ZREM', active_key(queue), tenant)
  redis.call('ZADD', spent_key(queue), at, tenant)
  redis.call('ZREMRANGEBYSCORE', spent_key(queue), '-inf', number(redis.call('GET', P .. 'floor:' .. queue)))
end

-- Charge a tenant for lease time, in seconds, while jobs wait: else it takes nothing from others. One without a
-- virtual time is where the last choice was.
local function charge(queue, tenant, seconds)
  if redis.call('ZADD', active_key(queue), 'XX', 'INCR', seconds, tenant) then return end
  if redis.call('EXISTS', active_key(queue)) == 0 then return end
  local at = redis.call('ZSCORE', spent_key(queue), tenant) or redis.call('GET', P .. 'floor:' .. queue)
  redis.call('ZADD', spent_key(queue), number(at) + seconds, tenant)
end

-- Charge for the lease of a job up to now. A claim has paid for its first moments already.
local function charge_lease(key, f)
  local paid = number(f.paid_until)
  if paid > 0 and now > paid then
    charge(f.queue, f.tenant, math.min(now - paid, 3600))
    redis.call('HSET', key, 'paid_until', now)
  end
end

local function size_of(f, large_bytes)
  return number(f.work_bytes) >= tonumber(large_bytes) and 'large' or 'small'
end

-- The class of a job: its size, and the roots, buckets and backends that it uses.
local function class_of(f, size)
  return f.resources and size .. ' ' .. f.resources or size
end

-- One word at a time: a pattern of a word with a colon takes quadratic time, in which Redis does nothing else.
local function resources_of(class)
  local found = {}
  for name in string.gmatch(class or '', '%S+') do
    if string.find(name, '.:.') then table.insert(found, name) end
  end
  return found
end

local function used_key(resource) return P .. 'used:' .. resource end
local function blocked_key(resource) return P .. 'blocked:' .. resource end

-- Let a class of jobs be chosen, or no more for now.
local function open_class(queue, tenant, class)
  redis.call('SADD', sizes_key(queue, tenant), class)
  activate(queue, tenant)
end

local function shut_class(queue, tenant, class)
  redis.call('SREM', sizes_key(queue, tenant), class)
  if redis.call('EXISTS', sizes_key(queue, tenant)) == 0 then deactivate(queue, tenant) end
end

-- Let those classes be chosen again that waited for a resource. O(k) in their number.
local function unblock(resource)
  for _, entry in ipairs(redis.call('SMEMBERS', blocked_key(resource))) do
    local queue, tenant, class = string.match(entry, '^(%S+) (%S+) (.+)$')
    if queue and redis.call('EXISTS', ready_key(queue, tenant, class)) == 1 then open_class(queue, tenant, class) end
  end
  redis.call('DEL', blocked_key(resource))
end

local function unlist(name, queue, tenant, class)
  local set = ready_key(queue, tenant, class)
  if redis.call('ZREM', set, name) == 1 and redis.call('EXISTS', set) == 0 then shut_class(queue, tenant, class) end
end

-- Take a job out of the choice.
local function unready(name, f)
  for _, size in ipairs({ 'small', 'large' }) do unlist(name, f.queue, f.tenant, class_of(f, size)) end
  redis.call('ZREM', waiting_key(f), name)
end

-- Add members with one score to a sorted set; a call of Lua has room for some thousand words.
local function add_all(key, score, names)
  for from = 1, #names, 1000 do
    local words = {}
    for i = from, math.min(from + 999, #names) do
      table.insert(words, score)
      table.insert(words, names[i])
    end
    redis.call('ZADD', key, unpack(words))
  end
end

-- Put new jobs into the choice, all of one age and class. Their rank is their age; a priority is worth so many
-- seconds of age.
local function offer_all(names, f, class)
  add_all(ready_key(f.queue, f.tenant, class), number(f.created_at) + PENALTY_S[f.priority], names)
  open_class(f.queue, f.tenant, class)
  add_all(waiting_key(f), now, names)
end

-- Put a new job into the choice.
local function offer(name, f, large_bytes)
  offer_all({ name }, f, class_of(f, size_of(f, large_bytes)))
end

-- Put a job into the choice, whatever set it is in.
local function ready(name, f, large_bytes)
  unready(name, f)
  redis.call('ZREM', P .. 'delayed', name)
  redis.call('ZREM', P .. 'leased', name)
  offer(name, f, large_bytes)
end

-- Leave a job to workers of a newer version, for want of a feature.
local function put_aside(key, name, f, feature)
  unready(name, f)
  redis.call('ZREM', P .. 'leased', name)
  redis.call('ZREM', P .. 'delayed', name)
  redis.call('HSET', key, 'waits_for', feature)
  redis.call('ZADD', P .. 'newer', now, name)
end

-- Note that a job waits for no newer version any more: it is claimed, or ends.
local function no_longer_aside(key, name, f)
  if not f.waits_for then return end
  redis.call('HDEL', key, 'waits_for')
  redis.call('ZREM', P .. 'newer', name)
end

-- The number of members that last, of a set that is by when they end.
local function lasting(key)
  return redis.call('ZCARD', key) - drop(key, now)
end

-- -- wake-ups ------------------------------------------------------------------------------------------

local MOST_WAKE_UPS = @MOST_WAKE_UPS@

-- Whether a queue has jobs that may run: ready ones, of a tenant that is not at its cap.
local function has_choice(queue)
  return redis.call('EXISTS', active_key(queue)) == 1
end

-- Push a wake-up into the broker's list of a queue, unless that is full. Where the broker is elsewhere `list` is
-- empty. Answers how many the caller is to send there.
local function wake(list, message)
  if list == '' then return 1 end
  if redis.call('LLEN', list) < MOST_WAKE_UPS then redis.call('LPUSH', list, message) end
  return 0
end

-- -- leases and ends -----------------------------------------------------------------------------------

local function worker_of(process) return string.match(process or '', '^[^/]*') end  -- without the pid of its child
local function large_key(process) return P .. 'large:' .. worker_of(process) end
local function stalls_key(process) return P .. 'stalls:' .. worker_of(process) end
local function probes_key(process) return P .. 'probes:' .. worker_of(process) end

-- Have a worker leave roots alone for so many seconds.
local function leave_alone(worker, resources, seconds)
  for _, resource in ipairs(resources) do
    if string.sub(resource, 1, 5) == 'root:' then
      redis.call('ZADD', stalls_key(worker), 'GT', now + seconds, resource)
      redis.call('EXPIRE', stalls_key(worker), 86400)
    end
  end
end

local function release(f, name)  -- the lease of a job is over
  local worker = f.worker or ''
  redis.call('ZREM', P .. 'leased', name)
  redis.call('ZREM', leases_key(f.tenant), name)
  redis.call('ZREM', large_key(worker), name)
  for _, resource in ipairs(resources_of(f.resources)) do
    redis.call('ZREM', used_key(resource), name)
    redis.call('ZREM', probes_key(worker), resource)
    unblock(resource)
  end
  local capped = redis.call('SMEMBERS', capped_key(f.tenant))
  for _, queue in ipairs(capped) do
    if redis.call('EXISTS', sizes_key(queue, f.tenant)) == 1 then activate(queue, f.tenant) end
  end
  if capped[1] then redis.call('DEL', capped_key(f.tenant)) end
end

-- -- attempts that are over ----------------------------------------------------------------------------

-- Attempts that `history` of a record keeps, the newest last. Each is a line of JSON, of at most so many bytes: number,
-- how it ended and why, how many ended so in a row, when the first of them began and the last one ended, its process, and
-- 1 for an attempt at a part of the job. NAMED_BYTES of memory are those of the field itself.
local MOST_PAST, PAST_BYTES, NAMED_BYTES = 10, 300, 120

-- Note how an attempt at a job ended that did not end the job; of a part in the record of the whole, which people see.
local function note_past(f, how, cause)
  local key, name = job, id
  local began = number(redis.call('HGET', job, 'began_at') or f.started_at)
  redis.call('HSET', job, 'attempt_id', '')  -- whatever that attempt asks for now changes nothing
  if f.parent then
    key, name = P .. 'job:' .. f.parent, f.parent
    if redis.call('HGET', key, 'state') ~= 'running' then return end
  end
  local old, lines, times = redis.call('HGET', key, 'history') or '', {}, 1
  if #old <= MOST_PAST * PAST_BYTES then
    for line in string.gmatch(old, '[^\n]+') do table.insert(lines, line) end
  end
  local head = string.format('[%d,"%s","%s",', number(f.attempt), how, string.sub(string.gsub(cause, '[^%w_]', '_'), 1, 64))
  local last = lines[#lines] or ''
  if how == 'deferred' and string.sub(last, 1, #head) == head then  -- what is away for long is one line
    local count, since = string.match(string.sub(last, #head + 1), '^(%d+),([%d.]+),')
    times, began = number(count) + 1, number(since)
    table.remove(lines)
  end
  local process = string.sub(string.gsub(f.worker or '', '[^%w:/._-]', '_'), 1, 120)
  table.insert(lines, head .. string.format('%d,%.3f,%.3f,"%s",%d]', times, began, now, process, f.parent and 1 or 0))
  while #lines > MOST_PAST do table.remove(lines, 1) end
  local text = table.concat(lines, '\n')
  redis.call('HSET', key, 'history', text)
  local more = math.ceil((#text - #old) * 3 / 2)  -- Redis rounds up to the sizes of its allocator
  hold(f.tenant, name, more + (old == '' and NAMED_BYTES or 0))
end

-- Note the attempt that held a job until its lease ran out: it ended as its process did, where the parent of that saw it.
-- A job in parts runs without an attempt.
local function note_lost(f)
  if f.state == 'queued' or (f.attempt_id or '') == '' or redis.call('HEXISTS', job, 'parts') == 1 then return end
  local cause = redis.call('GET', P .. 'died:' .. (f.worker or ''))
  if not cause then
    local seen = number(redis.call('ZSCORE', P .. 'workers', worker_of(f.worker)))
    cause = seen < now - SEEN_S and 'worker_gone' or ''
  end
  note_past(f, 'lease_lost', cause)
end

-- Take the lease from a job; one that runs is queued again. The caller puts it into a set.
local function give_back(f, delay_s)
  charge_lease(job, f)
  release(f, id)
  redis.call('HSET', job, 'lease_until', 0)
  if f.state ~= 'running' then return end
  become(job, id, f, 'queued', 'not_before', now + delay_s)
  redis.call('ZADD', P .. 'expiring', waits_until(f), id)
end

local function quota_key(tenant)  -- the open jobs of a tenant by expiry, without their parts
  return P .. 'open:' .. (tenant or '')
end

-- The input of a job is in the spool no more: it counts no longer for its tenant's quota.
local function unspool(tenant, name) uncount(P .. 'spooled:' .. (tenant or ''), name) end

local function close(key, name, f, state, code, keep_s)
  charge_lease(key, f)
  if f.state ~= 'running' then  -- else its claim did so
    unready(name, f)
    redis.call('ZREM', P .. 'expiring', name)
  end
  redis.call('ZREM', P .. 'delayed', name)
  become(key, name, f, state, 'error', code, 'lease_until', 0, 'ended_at', now)
  no_longer_aside(key, name, f)
  redis.call('ZREM', P .. 'open', name)
  redis.call('ZREM', quota_key(f.tenant), name)
  if state == 'succeeded' then
    for _, resource in ipairs(resources_of(f.resources)) do
      redis.call('ZREM', stalls_key(f.worker), resource)
    end
  end
  if state == 'cancelled' then unspool(f.tenant, name) end
  if code ~= 'attempts_exhausted' and code ~= 'record_refused' and f.spooled then
    redis.call('ZADD', P .. 'inputs', now, name)
  end
  release(f, name)
  local expires = number(f.expires_at)
  if number(f.keep_for) > 0 then expires = math.min(expires, now + number(f.keep_for)) end
  if expires <= 0 then expires = now end
  redis.call('ZADD', P .. 'ended', expires, name)
  redis.call('EXPIREAT', key, math.floor(expires + keep_s))
  redis.call('EXPIREAT', P .. 'blobs:' .. name, math.floor(expires + keep_s))
  if not f.parent then note_lists(name, f, expires + keep_s) end
  event(f, name, state, code)
  if index_group(name, f, false, expires + keep_s) then event(f, name, 'ended', '', 'group') end
end

-- A part that ends counts for its parent's progress: of a part that was given up, what it had settled well
-- still counts. After the last one a worker verifies the ends of all and ends the parent (END_PARENT); if
-- it dies, REAP makes that a chore.
local function count(parent, state, code)
  local whole = P .. 'job:' .. parent
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
  redis.call('ZADD', P .. 'leased', now + 5, parent)
end

local function finish(f, state, code, keep_s)
  close(job, id, f, state, code, keep_s)
  if f.parent then count(f.parent, state, code)
  elseif code == 'attempts_exhausted' or code == 'record_refused' then
    redis.call('ZADD', P .. 'dead', now, id)
    redis.call('ZADD', P .. 'dead:' .. f.tenant, now, id)
  end
end

local function parts_ended(key)
  local f = redis.call('HMGET', key, 'parts', 'parts_left')
  return f[1] and number(f[2]) <= 0
end

local function parent_stopped(parent)
  if not parent then return false end
  local w = redis.call('HMGET', P .. 'job:' .. parent, 'state', 'cancel')
  return w[1] ~= 'running' or w[2] == '1'
end

-- Whether the attempt of this id holds a job; whether it is to stop.
local function held(f, attempt_id)
  local ours = (f.state == 'running' or f.state == 'committing') and f.attempt_id == attempt_id
  return ours, f.cancel == '1' or parent_stopped(f.parent)
end

-- End a job that no attempt holds, or one that is fenced off now; a worker tidies what it left.
local function end_unheld(f, state, code, keep_s)
  add(job, 'fence', 1)
  finish(f, state, code, keep_s)
  redis.call('ZADD', P .. 'chores', now, id)
end
