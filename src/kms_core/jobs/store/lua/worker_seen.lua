#!lua flags=allow-oom
-- Note that a worker lives. O(log w).
-- Where asked to, or if it counted as gone, count the processes that serve each queue, and look at jobs that wait
-- for a newer version: each worker does, as it may be the only one that can. O(w) in the number of processes.
-- KEYS: workers   ARGV: worker, its processes, seconds after which a silent worker is gone, 1 to count, its version
--   and when it started or '', its queues
local slots, processes = P .. 'slots', tonumber(ARGV[2])
local was_gone = number(redis.call('ZSCORE', KEYS[1], id)) < now - tonumber(ARGV[3])
if processes > 0 then redis.call('ZADD', KEYS[1], now, id) end
if ARGV[4] ~= '1' and not was_gone then return {'seen'} end
-- Sixty of the jobs that waited for a newer version: those that this one can do are due. The clock draws
-- them, since workers that take turns at a list would each look at the same ones again.
local waiting = redis.call('ZCARD', P .. 'newer')
local first = waiting > 60 and 60 * (math.floor(now * 1000000) % math.ceil(waiting / 60)) or 0
for _, name in ipairs(waiting > 0 and redis.call('ZRANGE', P .. 'newer', first, first + 59) or {}) do
  local f = record(P .. 'job:' .. name)
  if not f.state or not lacks(redis.call('HGET', P .. 'job:' .. name, 'sealed') or '', f.needs) then
    redis.call('ZREM', P .. 'newer', name)
    redis.call('ZADD', P .. 'leased', now, name)
  end
end
if processes > 0 then
  redis.call('HSET', slots, id, processes .. ' ' .. table.concat(ARGV, ' ', 6) .. ' ' .. ARGV[5])
else
  redis.call('ZREM', KEYS[1], id)
  redis.call('HDEL', slots, id)
  redis.call('HDEL', P .. 'stuck', id)
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], 0, now - 10 * tonumber(ARGV[3]))
local alive = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - tonumber(ARGV[3]), '+inf')) do
  alive[name] = true
end
local capacity, all = {}, redis.call('HGETALL', slots)
for i = 1, #all, 2 do
  if alive[all[i]] then
    local count = number(string.match(all[i + 1], '^%d+'))
    for queue in string.gmatch(all[i + 1], '%a[%a.]*') do capacity[queue] = (capacity[queue] or 0) + count end
  else
    redis.call('HDEL', slots, all[i])
  end
end
for _, name in ipairs(redis.call('HKEYS', P .. 'stuck')) do
  if not alive[name] then redis.call('HDEL', P .. 'stuck', name) end
end
for queue in pairs(QUEUES) do
  for _, process in ipairs(redis.call('ZRANGE', draining_key(queue), 0, -1)) do
    if not alive[worker_of(process)] then redis.call('ZREM', draining_key(queue), process) end
  end
  redis.call('SET', P .. 'capacity:' .. queue, capacity[queue] or 0, 'EX', 10)
end
return {'seen'}
