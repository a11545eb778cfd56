#!lua flags=allow-oom
-- Take the ids of expired records out of all lists. O(log n) for each.
-- KEYS: any key of jobs   ARGV: '', how many at most
for _, name in ipairs(redis.call('ZRANGE', P .. 'records', '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2])) do
  if redis.call('EXISTS', P .. 'job:' .. name) == 1 then redis.call('ZREM', P .. 'records', name)  -- it was retried
  else
    local tenant = string.match(redis.call('HGET', P .. 'lists', name) or '', 'tenant:(%S+)')
    forget(name, tenant)
    if tenant and redis.call('EXISTS', P .. 'tenant:' .. tenant) == 0 then
      redis.call('SREM', P .. 'tenants', tenant)
      redis.call('DEL', held_key(tenant))  -- whatever was counted: it has nothing
    end
  end
end
return {'forgotten'}
