#!lua
-- Answer the time of a Redis that has room for jobs and takes writes; otherwise Redis refuses the script. O(1).
-- KEYS: any key of jobs   ARGV: '', the used part of maxmemory that counts as full, bytes in place of maxmemory
--   where there is none, 1 to write in any case
-- Answers `memory` while it is full, else the time, and 1 if less than half of the memory is used.
return room_for_jobs(ARGV[2], ARGV[3], ARGV[4] == '1') or {'memory'}
