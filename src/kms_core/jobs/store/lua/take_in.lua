#!lua flags=allow-oom
-- Store deliveries of webhooks and move the cursor, unless another process moved it. O(d log n) in deliveries.
-- KEYS: cursor, entries, endpoints
-- ARGV: cursor as read, cursor as moved, then of each delivery: id, entry, endpoint, when
if (redis.call('GET', KEYS[1]) or '0-0') ~= ARGV[1] then return {'moved'} end
for i = 3, #ARGV, 4 do
  if redis.call('HEXISTS', KEYS[2], ARGV[i]) == 0 then
    redis.call('SADD', KEYS[3], ARGV[i + 2])
    redis.call('ZADD', P .. 'webhooks:due:' .. ARGV[i + 2], ARGV[i + 3], ARGV[i])
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return {'taken'}
