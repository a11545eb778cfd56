#!lua flags=allow-oom
-- Give back a job that a worker of this version cannot do, as its sealed record says: without an attempt, and
-- until a newer worker takes it. O(log n).
-- KEYS: job   ARGV: id, attempt id, the feature that it needs
local f = record(job)
if not held(f, ARGV[2]) then return {'lost'} end
local state = f.state
note_past(f, 'deferred', 'newer_worker')
give_back(f, 0)
redis.call('HSET', job, 'needs', ARGV[3])
if state == 'running' then add(job, 'attempt', -1) end
put_aside(job, id, f, ARGV[3])
return {'aside'}
