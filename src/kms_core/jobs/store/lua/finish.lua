#!lua flags=allow-oom
-- End a job. O(log n).
-- KEYS: job
-- ARGV: id, attempt id, state, code, keep_s, id of the whole, length of the next list, name and bytes of a small
--   blob, ..., field, value, ...
local f = record(job)
if not held(f, ARGV[2]) then return {'lost'} end
local first = 8 + tonumber(ARGV[7])
if first > 8 then
  redis.call('HSET', P .. 'blobs:' .. ARGV[6], unpack(ARGV, 8, first - 1))
  hold(f.tenant, 'b' .. ARGV[6], #ARGV[first - 1])
else redis.call('HDEL', P .. 'job:' .. ARGV[6], 'small')  -- the note of its submission that no blob is elsewhere
end
if #ARGV >= first then redis.call('HSET', job, unpack(ARGV, first)) end
finish(f, ARGV[3], ARGV[4], tonumber(ARGV[5]))
return {'finished'}
