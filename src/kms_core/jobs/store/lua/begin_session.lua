#!lua
-- Store a session of the pages, and end the oldest ones where it would exceed a bound. O(sessions of the tenant).
-- KEYS: sessions of the tenant by age   ARGV: name, sealed record, label of the credential, seconds that it lasts,
-- most sessions of a credential, most of a tenant
local name, credential, lasts_s = ARGV[1], ARGV[3], tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - lasts_s)
local mine, others = {}, {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  table.insert(string.sub(member, 1, #credential) == credential and mine or others, member)
end
local over = math.max(#mine + 1 - tonumber(ARGV[5]), #mine + #others + 1 - tonumber(ARGV[6]))
for _, sessions in ipairs({mine, others}) do
  for _, member in ipairs(sessions) do
    if over <= 0 then break end
    redis.call('DEL', P .. 'session:' .. string.sub(member, #credential + 1))
    redis.call('ZREM', KEYS[1], member)
    over = over - 1
  end
end
redis.call('SET', P .. 'session:' .. name, ARGV[2], 'EX', lasts_s)
redis.call('ZADD', KEYS[1], now, credential .. name)
redis.call('EXPIRE', KEYS[1], lasts_s)
return {1}
