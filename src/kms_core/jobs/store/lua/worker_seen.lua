#!lua flags=allow-oom
-- Note that a worker lives, and look at jobs that wait for a newer version: each worker does, as it may be the
-- only one that can. Count the processes that serve each queue where this worker has changed, or the last
-- count, by any worker, is three seconds old. O(w) in the number of their processes.
-- KEYS: workers   ARGV: worker, its processes, seconds after which a silent worker is gone, its version and when it
--   started or '', its queues
local slots = P .. 'slots'
-- Twenty of the jobs that waited for a newer version: those that this one can do are due. The clock draws
-- them, since workers that take turns at a list would each look at the same ones again.
local twenties = math.ceil(redis.call('ZCARD', P .. 'newer') / 20)
local first = twenties > 1 and 20 * (math.floor(now * 1000000) % twenties) or 0
for _, name in ipairs(redis.call('ZRANGE', P .. 'newer', first, first + 19)) do
  local f = record(P .. 'job:' .. name)
  if not f.state or not lacks(redis.call('HGET', P .. 'job:' .. name, 'sealed') or '', f.needs) then
    redis.call('ZREM', P .. 'newer', name)
    redis.call('ZADD', P .. 'leased', now, name)
  end
end
if tonumber(ARGV[2]) > 0 then
  local serves = ARGV[2] .. ' ' .. table.concat(ARGV, ' ', 5) .. ' ' .. ARGV[4]
  local is_new = redis.call('ZADD', KEYS[1], now, id) == 1
  local is_fresh = redis.call('PTTL', P .. 'capacity:kms.bulk') > 7000
  if is_fresh and not is_new and redis.call('HGET', slots, id) == serves then return {'seen'} end
  redis.call('HSET', slots, id, serves)
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
  local processes = redis.call('ZRANGE', draining_key(queue), 0, -1)
  for _, process in ipairs(processes) do
    if not alive[worker_of(process)] then redis.call('ZREM', draining_key(queue), process) end
  end
  redis.call('SET', P .. 'capacity:' .. queue, capacity[queue] or 0, 'EX', 10)
end
return {'seen'}
