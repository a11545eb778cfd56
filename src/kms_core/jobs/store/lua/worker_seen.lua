#!lua flags=allow-oom
-- Note that a worker lives. O(log w).
-- Where asked to, also note its processes and queues, forget workers that are gone, and look at jobs that wait for a
-- newer version: each worker does, as it may be the only one that can. O(w) in the number of workers.
-- KEYS: workers   ARGV: worker, its processes, seconds after which a silent worker is gone, 1 to do so, its version
--   and when it started or '', its queues
local slots, processes = P .. 'slots', tonumber(ARGV[2])
if processes > 0 then redis.call('ZADD', KEYS[1], now, id) end
if ARGV[4] ~= '1' then return {'seen'} end
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
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], 0, now - 10 * tonumber(ARGV[3]))
local alive = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - tonumber(ARGV[3]), '+inf')) do
  alive[name] = true
end
for _, notes in ipairs({ slots, P .. 'stuck' }) do
  for _, name in ipairs(redis.call('HKEYS', notes)) do
    if not alive[name] then redis.call('HDEL', notes, name) end
  end
end
return {'seen'}
