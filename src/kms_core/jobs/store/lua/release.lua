#!lua flags=allow-oom
-- Let go of the result of an ended job: from then on it cannot be fetched, and the reaper deletes it. O(log n).
-- KEYS: job   ARGV: id, sealed record of the job that is meant, seconds until then; after a fetch also the
--   first byte that was sent, the byte behind the last one, and the size of the result
-- Bytes count as fetched from the first one on, without a gap. Answers a word.
local f = record(job)
local g = redis.call('HMGET', job, 'sealed', 'fetched', 'released')
if not f.state or g[1] ~= ARGV[2] then return {'gone'} end
if f.state == 'queued' or f.state == 'running' or f.state == 'committing' then return {'open'} end
if ARGV[4] then
  local fetched, size = number(g[2]), tonumber(ARGV[6])
  if tonumber(ARGV[4]) <= fetched and tonumber(ARGV[5]) > fetched then
    fetched = tonumber(ARGV[5])
    redis.call('HSET', job, 'fetched', string.format('%.0f', fetched))
  end
  if fetched < size then return {'kept'} end
end
local at, before = now + tonumber(ARGV[3]), number(g[3])
if before > 0 and before <= at then return {'released'} end
redis.call('HSET', job, 'released', at)
redis.call('ZADD', P .. 'ended', at, id)
redis.call('ZREM', P .. 'dead', id)
redis.call('ZREM', P .. 'dead:' .. f.tenant, id)
return {'released'}
