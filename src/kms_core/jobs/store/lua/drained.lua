#!lua flags=allow-oom
-- A process takes no more jobs for now. O(log n).
-- KEYS: any key of jobs   ARGV: '', worker, a queue, the broker's list of that queue or '', the message, queues
--   that the worker serves
-- Answers how many wake-ups are to be sent for that queue: one, if jobs are ready.
for i = 6, #ARGV do redis.call('ZREM', draining_key(ARGV[i]), ARGV[2]) end
if not has_choice(ARGV[3]) then return {0} end
return {wake(ARGV[3], 1, ARGV[4], ARGV[5])}
