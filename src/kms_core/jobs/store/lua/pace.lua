#!lua flags=allow-oom
-- The number of files that a part may start now, or the seconds until then: they are granted by then. O(1).
-- KEYS: job, the pace of the parent   ARGV: id, files wanted, files a second
local granted = number(redis.call('HGET', job, 'granted'))
if granted > 0 then
  redis.call('HSET', job, 'granted', 0)
  return {'go', granted, '0'}
end
local begin = math.max(now, number(redis.call('GET', KEYS[2])))
local following = begin + ARGV[2] / ARGV[3]
redis.call('SET', KEYS[2], string.format('%.6f', following), 'EX', math.ceil(following - now) + 1)
if begin <= now then return {'go', ARGV[2], '0'} end
redis.call('HSET', job, 'granted', ARGV[2])
return {'wait', 0, tostring(begin - now)}
