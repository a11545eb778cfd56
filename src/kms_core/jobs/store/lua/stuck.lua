#!lua flags=allow-oom
-- Note the processes of a worker that hang, and have it leave alone what they hang on. O(r).
-- KEYS: any key of jobs   ARGV: '', worker, number of those processes, seconds, resources
if tonumber(ARGV[3]) > 0 then redis.call('HSET', P .. 'stuck', ARGV[2], ARGV[3])
else redis.call('HDEL', P .. 'stuck', ARGV[2]) end
leave_alone(ARGV[2], { unpack(ARGV, 5) }, ARGV[4])
return {'noted'}
