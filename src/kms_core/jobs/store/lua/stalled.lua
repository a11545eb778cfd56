#!lua flags=allow-oom
-- Take the lease from an attempt that advances nothing, and have its worker leave alone what it works on.
-- O(log n).
-- KEYS: job   ARGV: id, attempt id, worker, seconds to leave its roots alone, bytes of a large job, keep_s
-- The attempt counts. A job that is to be cancelled ends. A commit that has begun keeps its state, for any worker to finish.
local f = record(job)
local ours, cancel = held(f, ARGV[2])
local state = f.state
leave_alone(ARGV[3], resources_of(f.resources), ARGV[4])
if not ours or redis.call('HEXISTS', job, 'parts') == 1 then return {'lost', f.resources or ''} end
note_past(f, 'stalled', '')
if state == 'running' and cancel then
  end_unheld(f, 'cancelled', 'cancelled', tonumber(ARGV[6]))
  return {'cancelled', f.resources or ''}
end
give_back(f, 0)
ready(id, f, ARGV[5])
if state == 'running' then event(f, id, 'queued', 'stalled') end
return {'stalled', f.resources or ''}
