#!lua flags=allow-oom
-- Note that the input of an ended job is in the spool no more. O(log n).
-- KEYS: job   ARGV: id
-- A result counts for its tenant's quota until it goes, as if it were as large as the input.
local g = redis.call('HMGET', job, 'tenant', 'error')
redis.call('ZREM', P .. 'inputs', id)
if g[2] and g[2] ~= '' and g[2] ~= 'items_failed' then unspool(g[1], id) end
return {'removed'}
