#!lua
-- Turn a job into the parent of its parts, all ready at once. O(p log n) in its parts, of which there are 400 at most.
-- KEYS: job   ARGV: id, attempt id, signed split, bytes of a large job, the broker's list or '', the message, then
--   of each part: id, sealed record, items, bytes, bytes that it reads
-- The job runs without a lease until the last part ends. Parts of an earlier generation begin again, with
-- no attempt. Answers `split` and how many wake-ups are to be sent.
local f = record(job)
local ours, cancel = held(f, ARGV[2])
if not ours or f.state ~= 'running' then return {'lost'} end
if redis.call('HEXISTS', job, 'parts') == 1 then return {'split', 0} end  -- repeated
if cancel then return {'cancel'} end
local expires = f.run_by
local names, items, bytes, classes, memory = {}, 0, 0, {}, 0
for i = 7, #ARGV, 5 do
  local name, key = ARGV[i], P .. 'job:' .. ARGV[i]
  local fence = redis.call('HGET', key, 'fence')
  if fence then
    redis.call('DEL', key)
    redis.call('HSET', key, 'fence', number(fence) + 1)
    redis.call('ZREM', P .. 'ended', name)
    redis.call('ZREM', P .. 'delayed', name)
    redis.call('ZREM', P .. 'leased', name)
    unready(name, f)
  else
    memory = memory + PART_BYTES + #ARGV[i + 1]
  end
  redis.call('HSET', key, 'state', 'queued', 'sealed', ARGV[i + 1], 'items', ARGV[i + 2], 'bytes', ARGV[i + 3],
    'work_bytes', ARGV[i + 4], 'tenant', f.tenant, 'kind', f.kind or '', 'queue', f.queue,
    'created_at', f.created_at or '', 'expires_at', f.expires_at or '', 'run_by', f.run_by, 'start_by', f.run_by,
    'keep_for', f.keep_for or '', 'priority', f.priority, 'parent', id, unpack(f.resources and { 'resources', f.resources } or {}))
  local class = class_of(f, number(ARGV[i + 4]) >= tonumber(ARGV[4]) and 'large' or 'small')
  classes[class] = classes[class] or {}
  table.insert(classes[class], name)
  table.insert(names, name)
  items, bytes = items + ARGV[i + 2], bytes + ARGV[i + 3]
end
add_all(P .. 'open', now, names)
add_all(P .. 'expiring', expires, names)
for class, members in pairs(classes) do offer_all(members, f, class) end
hold(f.tenant, id, memory)
if redis.call('EXISTS', P .. 'room') == 1 then redis.call('DECRBY', P .. 'room', string.format('%d', memory)) end
charge_lease(job, f)
redis.call('HSET', job, 'split', ARGV[3], 'parts', #names, 'parts_left', #names, 'lease_until', expires,
  'items', string.format('%.0f', items), 'bytes', string.format('%.0f', bytes))
release(f, id)
redis.call('ZADD', P .. 'leased', expires, id)
return {'split', wake(ARGV[5], ARGV[6])}
