#!lua flags=allow-oom
-- Note that the result of a job is deleted, with its small blobs. O(log n).
-- KEYS: job   ARGV: id
-- A worker tidies what more than one attempt may have left beside the target.
local fence = redis.call('HGET', job, 'fence')
if fence then redis.call('HSET', job, 'purged', 1) end
local tenant = redis.call('HGET', job, 'tenant')
unspool(tenant, id)
uncount(held_key(tenant), 'b' .. id)
redis.call('UNLINK', P .. 'blobs:' .. id)
redis.call('ZREM', P .. 'ended', id)
redis.call('ZREM', P .. 'inputs', id)
if number(fence) > 1 then redis.call('ZADD', P .. 'chores', now, id) end
return {fence or '0'}
