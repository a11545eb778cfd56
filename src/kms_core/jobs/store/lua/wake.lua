#!lua flags=allow-oom
-- Send as many wake-ups for each queue as it has ready jobs and idle processes. O(log n) for each queue.
-- KEYS: any key of jobs   ARGV: '', and of each queue: its name, the broker's list or '', the message
local counts = {}
for i = 2, #ARGV, 3 do
  local is_wanted = has_choice(ARGV[i]) and idle(ARGV[i]) > 0
  -- one at least: a process that finds nothing takes tenants without ready jobs out of the choice
  local most = is_wanted and math.max(1, ready_jobs(ARGV[i]))
  table.insert(counts, most and wake(ARGV[i], most, ARGV[i + 1], ARGV[i + 2]) or 0)
end
return counts
