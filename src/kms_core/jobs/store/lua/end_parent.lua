#!lua flags=allow-oom
-- End a job whose parts have all ended. Repeating it, or doing it in two workers, changes nothing. O(log n), and O(t) in its tallies.
-- KEYS: job   ARGV: id, attempt id, state, code, keep_s, field, value, ...
local g = redis.call('HMGET', job, 'state', 'attempt_id', 'cancel')
if g[1] ~= 'running' and g[1] ~= 'queued' then return {'ended'} end
if (g[2] or '') ~= ARGV[2] or not parts_ended(job) then return {'lost'} end
if g[3] == '1' then
  finish(record(job), 'cancelled', 'cancelled', tonumber(ARGV[5]))
  return {'cancelled'}
end
for i = 6, #ARGV, 1000 do redis.call('HSET', job, unpack(ARGV, i, math.min(i + 999, #ARGV))) end  -- as Lua has room
finish(record(job), ARGV[3], ARGV[4], tonumber(ARGV[5]))
return {'finished'}
