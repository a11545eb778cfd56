#!lua flags=allow-oom
-- Send as many wake-ups for each queue as it has ready jobs, or all queues have chores, and as it has idle
-- processes. O(log n) for each queue.
-- KEYS: any key of jobs   ARGV: '', and of each queue: its name, the broker's list or '', the message
local counts, chores = {}, redis.call('ZCARD', P .. 'chores')
for i = 2, #ARGV, 3 do
  local most = 0
  if (chores > 0 or has_choice(ARGV[i])) and idle(ARGV[i]) > 0 then
    -- one at least: a process that finds nothing takes tenants without ready jobs out of the choice
    most = math.max(chores, has_choice(ARGV[i]) and math.max(1, ready_jobs(ARGV[i])) or 0)
  end
  table.insert(counts, most > 0 and wake(ARGV[i], most, ARGV[i + 1], ARGV[i + 2]) or 0)
end
return counts
