#!lua flags=allow-oom
-- Send as many wake-ups for each queue as it has ready jobs and idle processes. O(log n) for each queue.
-- KEYS: any key of jobs   ARGV: '', and of each queue: its name, the broker's list or '', the message
local counts, active = {}, {}
for i = 2, #ARGV, 3 do
  active[#active + 1] = active_key(ARGV[i])
  counts[#counts + 1] = 0
end
if redis.call('EXISTS', unpack(active)) == 0 then return counts end  -- one command while nothing is to be done
for i = 2, #ARGV, 3 do
  if has_choice(ARGV[i]) and capacity(ARGV[i]) > 0 then
    -- one at least: a process that finds nothing takes tenants without ready jobs out of the choice
    counts[(i + 1) / 3] = wake(ARGV[i], math.max(1, ready_jobs(ARGV[i])), ARGV[i + 1], ARGV[i + 2])
  end
end
return counts
