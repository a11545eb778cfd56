#!lua flags=allow-oom
-- Note the processes of a worker that cannot be ended, and have it leave alone what they hang on. O(r).
-- KEYS: any key of jobs   ARGV: '', worker, number of those processes, seconds, resources
if tonumber(ARGV[3]) > 0 then redis.call('HSET', P .. 'stuck', ARGV[2], ARGV[3])
else redis.call('HDEL', P .. 'stuck', ARGV[2]) end
for i = 5, #ARGV do
  if string.sub(ARGV[i], 1, 5) == 'root:' then
    redis.call('ZADD', stalls_key(ARGV[2]), 'GT', now + ARGV[4], ARGV[i])
    redis.call('EXPIRE', stalls_key(ARGV[2]), 86400)
  end
end
return {'noted'}
