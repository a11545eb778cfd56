#!lua flags=allow-oom
-- Extend a lease and report progress. O(log n).
-- KEYS: job, busy sign of the worker   ARGV: id, attempt id, lease_s, field, value, ...
local f = record(job)
local ours, cancel = held(f, ARGV[2])
if not ours then return {'lost'} end
if redis.call('HEXISTS', job, 'parts') == 1 then return {'held'} end  -- late: it runs without a lease by now
if f.state == 'running' and f.run_by <= now then return {'expired'} end
local lease_until = f.state == 'running' and lease_end(f, tonumber(ARGV[3])) or now + tonumber(ARGV[3])
redis.call('SET', KEYS[2], now, 'EX', 3600)
redis.call('HSET', job, 'lease_until', lease_until, unpack(ARGV, 4))
charge_lease(job, f)
redis.call('ZADD', P .. 'leased', lease_until, id)
redis.call('ZADD', leases_key(f.tenant), lease_until, id)
for _, resource in ipairs(resources_of(f.resources)) do
  redis.call('ZADD', used_key(resource), 'XX', lease_until, id)
  redis.call('ZADD', probes_key(f.worker), 'XX', lease_until, resource)
end
if redis.call('ZSCORE', large_key(f.worker), id) then
  redis.call('ZADD', large_key(f.worker), lease_until, id)
  redis.call('EXPIRE', large_key(f.worker), 3600)
end
return {cancel and 'cancel' or 'held'}
