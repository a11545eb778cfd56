#!lua flags=allow-oom
-- Send a wake-up for each queue that has ready jobs, or for all where there are chores. O(1) for each queue.
-- One is enough: a process that was woken and finds work has another sent.
-- KEYS: any key of jobs   ARGV: '', and of each queue: its name, the broker's list or '', the message
-- Answers for each queue how many the caller is to send.
local counts, has_chores = {}, redis.call('EXISTS', P .. 'chores') == 1
for i = 2, #ARGV, 3 do
  local has_work = has_chores or has_choice(ARGV[i])
  table.insert(counts, has_work and wake(ARGV[i + 1], ARGV[i + 2]) or 0)
end
return counts
