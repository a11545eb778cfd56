#!lua flags=allow-oom
-- Cancel a job that is queued, or ask for the end of a running one. O(log n), and O(p) in its parts.
-- KEYS: job   ARGV: id, sealed record of the job that is meant, keep_s, bytes of a large job, ids of its parts
-- Parts that wait for their time become ready: the worker that takes them ends them.
local f = record(job)
if not f.state or (redis.call('HGET', job, 'sealed') or '') ~= ARGV[2] then return {'gone'} end
if f.state == 'queued' then
  local claims = add(job, 'fence', 1)
  finish(f, 'cancelled', 'cancelled', tonumber(ARGV[3]))
  if claims > 1 then redis.call('ZADD', P .. 'chores', now, id) end  -- half a target may be left
  return {'cancelled'}
end
if f.state == 'running' then redis.call('HSET', job, 'cancel', 1) end
for i = 5, #ARGV do
  local key = P .. 'job:' .. ARGV[i]
  local part = record(key)
  if part.state == 'queued' and number(redis.call('HGET', key, 'not_before')) > now then
    redis.call('HSET', key, 'not_before', 0)
    ready(ARGV[i], part, ARGV[4])
  end
end
return {f.state}
