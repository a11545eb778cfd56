#!lua flags=allow-oom
-- Give a process its next job: the oldest of the tenant with the least virtual time, or the one that is named.
-- O(log n) for each tenant and class that is passed over because all that it has ready is capped.
-- KEYS: job, or any key of jobs where none is named; busy sign of the worker
-- ARGV: id or '', worker, lease_s, most attempts, keep_s, most leases of a tenant, bytes of a large job, most
--   large jobs on this worker (0: any), most leases of each resource as JSON, id of the new attempt, queues that
--   the worker serves, of which the first comes first
-- Answers `none`; `chore` and a job that wants a hand; `closed`, a job, its state and code; `claimed`, the job
-- and its input where that is small; or why the job that was named is not to be had.
local worker, tenant_cap, large_cap, attempt_id = ARGV[2], tonumber(ARGV[6]), tonumber(ARGV[8]), ARGV[10]
local large, bounds = large_key(worker), cjson.decode(ARGV[9])

local function may_be_large()
  if large_cap <= 0 then return true end
  return lasting(large) < large_cap
end

local function is_capped(tenant)
  return lasting(leases_key(tenant)) >= tenant_cap
end

-- The first resource of a class that has as many leases as it may.
local function full_resource(class)
  for _, resource in ipairs(resources_of(class)) do
    if bounds[resource] and lasting(used_key(resource)) >= bounds[resource] then return resource end
  end
end

local stalls = {}

-- Whether this worker leaves a class alone: an attempt at one of its resources stalled there. After a while
-- one attempt at a time is made, until one succeeds.
local function is_stalled(class)
  for _, resource in ipairs(resources_of(class)) do
    if stalls[resource] then
      if stalls[resource] > now then return true end
      if number(redis.call('ZSCORE', probes_key(worker), resource)) > now then return true end
    end
  end
  return false
end

-- The first job with the lowest rank, and its class; nil if a tenant has none that may run.
local function best_of(queue, tenant)
  local found, lowest, seen, found_in
  for _, class in ipairs(redis.call('SMEMBERS', sizes_key(queue, tenant))) do
    local first = redis.call('ZRANGE', ready_key(queue, tenant, class), 0, 0, 'WITHSCORES')
    local full = first[1] and full_resource(class)
    if not first[1] then
      shut_class(queue, tenant, class)
    elseif full then
      redis.call('SADD', blocked_key(full), queue .. ' ' .. tenant .. ' ' .. class)
      shut_class(queue, tenant, class)
    else
      seen = true
      if (not lowest or tonumber(first[2]) < lowest) and not is_stalled(class)
        and (string.sub(class, 1, 5) == 'small' or may_be_large()) then
        found, lowest, found_in = first[1], tonumber(first[2]), class
      end
    end
  end
  return found, seen, found_in
end

-- Note the virtual time of a tenant that is chosen: none becomes active before it.
local function note_choice(queue, at)
  local floor = number(redis.call('GET', P .. 'floor:' .. queue))
  if tonumber(at) > floor then redis.call('SET', P .. 'floor:' .. queue, at) end
end

local function choose(queue)
  local at = 0
  while true do
    local tenants = redis.call('ZRANGE', active_key(queue), at, at + 15, 'WITHSCORES')
    if #tenants == 0 then return nil end
    for i = 1, #tenants, 2 do
      local tenant = tenants[i]
      if is_capped(tenant) then
        deactivate(queue, tenant)
        redis.call('SADD', capped_key(tenant), queue)
      else
        local name, seen, class = best_of(queue, tenant)
        if name then
          note_choice(queue, tenants[i + 1])
          return name, tenant, class
        end
        if seen then at = at + 1 else deactivate(queue, tenant) end
      end
    end
  end
end

-- Try to claim one job. Answers a list that begins with a word.
local function try(key, name, named)
  local f = record(key)
  if not f.state then return {'gone'} end
  if f.state ~= 'queued' and f.state ~= 'running' and f.state ~= 'committing' then return {'ended'} end
  local g = redis.call('HMGET', key, 'lease_until', 'not_before', 'fence', 'sealed', 'commit', 'deferrals', 'log',
    'parts', 'parts_left')
  if g[8] and number(g[9]) <= 0 then return {'parts_ended'} end
  local input = redis.call('HMGET', P .. 'blobs:' .. name, 'items', 'upload')
  if f.state ~= 'queued' and number(g[1]) > now then return {'leased'} end
  if f.state == 'queued' and number(g[2]) > now then
    redis.call('ZADD', P .. 'delayed', number(g[2]), name)
    return {'early'}
  end
  local feature = lacks(g[4], f.needs)
  if feature then
    if f.state ~= 'running' then put_aside(key, name, f, feature) end  -- else its lease has run out: see REAP
    return {'newer'}
  end
  job, id = key, name
  local fence, attempt = number(g[3]) + 1, number(f.attempt)
  local size = size_of(f, ARGV[7])
  if f.state ~= 'committing' then
    local code, final = '', 'failed'
    if f.cancel == '1' or parent_stopped(f.parent) then code, final = 'cancelled', 'cancelled'
    elseif expiry(f) then code = expiry(f)
    elseif attempt >= tonumber(ARGV[4]) then code = 'attempts_exhausted' end
    if code ~= '' then
      note_lost(f)
      redis.call('HSET', key, 'fence', fence)
      finish(f, final, code, tonumber(ARGV[5]))
      return {'closed', name, final, code}
    end
    if named and is_capped(f.tenant) then return {'capped'} end
    if named and size == 'large' and not may_be_large() then return {'capped'} end
    if named and (full_resource(f.resources) or is_stalled(f.resources)) then return {'capped'} end
    attempt = attempt + 1
  end
  note_lost(f)
  local is_commit = f.state == 'committing'
  local lease_until = is_commit and now + tonumber(ARGV[3]) or lease_end(f, tonumber(ARGV[3]))
  if named then unready(name, f) else redis.call('ZREM', waiting_key(f), name) end  -- it was chosen out of its set
  redis.call('ZREM', P .. 'expiring', name)
  local lease = { 'attempt_id', attempt_id, 'fence', fence, 'attempt', attempt, 'lease_until', lease_until,
    'worker', worker, 'paid_until', now + 0.01 }
  if f.started_at then
    table.insert(lease, 'began_at')  -- of the first attempt it is started_at
    table.insert(lease, now)
  end
  if is_commit then
    redis.call('HSET', key, unpack(lease))
  else
    become(key, name, f, 'running', 'started_at', f.started_at or now, 'bytes_done', 0, 'items_done', 0,
      'items_failed', 0, unpack(lease))
  end
  no_longer_aside(key, name, f)
  charge(f.queue, f.tenant, 0.01)
  redis.call('ZADD', P .. 'leased', lease_until, name)
  redis.call('ZADD', leases_key(f.tenant), lease_until, name)
  for _, resource in ipairs(resources_of(f.resources)) do
    if bounds[resource] then redis.call('ZADD', used_key(resource), lease_until, name) end
    if stalls[resource] then
      redis.call('ZADD', probes_key(worker), lease_until, resource)
      redis.call('EXPIRE', probes_key(worker), 3600)
    end
  end
  if size == 'large' then
    redis.call('ZADD', large, lease_until, name)
    redis.call('EXPIRE', large, 3600)
  end
  f.attempt, f.again = string.format('%.0f', attempt), attempt > 1 or number(g[6]) > 0
  if not is_commit then event(f, name, 'running', '') end
  return {'claimed', name, fence, attempt, g[4], is_commit and g[5] or '', tostring(now - number(f.created_at)),
    g[6] or 0, g[7] or '', size == 'large' and 1 or 0, 1 - redis.call('EXISTS', P .. 'half'),
    input[1] or input[2] or ''}
end

redis.call('SET', KEYS[2], now, 'EX', 3600)
local found = redis.call('ZRANGE', stalls_key(worker), 0, -1, 'WITHSCORES')
for i = 1, #found, 2 do stalls[found[i]] = tonumber(found[i + 1]) end
if id ~= '' then return try(job, id, true) end
for _, name in ipairs(redis.call('ZRANGE', P .. 'chores', 0, 15)) do
  local f = redis.call('HMGET', P .. 'job:' .. name, 'state', 'resources')
  if not is_stalled(f[2] or '') then
    redis.call('ZREM', P .. 'chores', name)
    if f[1] then return {'chore', name} end  -- else its record is gone
  else redis.call('ZADD', P .. 'chores', now, name)  -- behind those that come next
  end
end
for i = 11, #ARGV do
  for count = 1, 100 do
    local name, tenant, class = choose(ARGV[i])
    if not name then break end
    unlist(name, ARGV[i], tenant, class)
    local is_readable, found = pcall(try, P .. 'job:' .. name, name, false)
    if is_readable and (found[1] == 'claimed' or found[1] == 'closed') then return found end
    for priority in pairs(PENALTY_S) do
      redis.call('ZREM', P .. 'waiting:' .. ARGV[i] .. ':' .. priority, name)
    end
  end
end
return {'none'}
