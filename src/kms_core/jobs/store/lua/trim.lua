#!lua flags=allow-oom
-- Drop the ids of expired records from a part of a list, and index those that a worker of 0.1 stored or ended.
-- O(n log n) in the ids looked at.
-- KEYS: a list of jobs, the tenants   ARGV: the rank to begin at, how many to look at, the tenant whose list it is
--   or '', 1 if it is the list of all dead jobs
-- Answers the rank to go on at, 0 at the end, and how many ids were dropped.
local begin, most, owner = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local listed = redis.call('ZRANGE', KEYS[1], begin, begin + most - 1, 'WITHSCORES')
local following = begin
for i = 1, #listed, 2 do
  local name, score = listed[i], listed[i + 1]
  local key = P .. 'job:' .. name
  if redis.call('EXISTS', key) == 0 then redis.call('ZREM', KEYS[1], name)
  else
    following = following + 1
    local f = record(key)
    if owner ~= '' and f.state and not f.parent then
      redis.call('ZADD', state_key({ tenant = owner }, f.state), number(f.created_at), name)
    elseif ARGV[4] == '1' then
      redis.call('ZADD', P .. 'dead:' .. f.tenant, score, name)
    end
  end
end
if owner ~= '' and redis.call('EXISTS', KEYS[1], quota_key(owner)) == 0 then redis.call('SREM', KEYS[2], owner) end
local dropped = #listed / 2 - (following - begin)
if #listed < 2 * most then following = 0 end
return {following, dropped}
