#!lua flags=allow-oom
-- Record a commit before it happens, or take it back. Repeating it changes nothing. O(log n).
-- KEYS: job   ARGV: id, attempt id, commit record, or '' to take it back
local f = record(job)
local ours, cancel = held(f, ARGV[2])
if not ours then return {'lost'} end
if ARGV[3] == '' then
  if f.state == 'committing' then become(job, id, f, 'running', 'commit', '') end
  return {'running'}
end
if f.state == 'committing' then
  if redis.call('HGET', job, 'commit') ~= ARGV[3] then return {'lost'} end
  redis.call('HSET', job, 'commit', ARGV[3])
  return {'committing'}
end
if cancel then return {'cancel'} end
if f.run_by <= now then return {'expired'} end  -- by this clock, whatever that of the worker says
become(job, id, f, 'committing', 'commit', ARGV[3])
event(f, id, 'committing', '')
return {'committing'}
