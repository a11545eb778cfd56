#!lua flags=allow-oom
-- Add to counts that all processes share. O(n) in the counts, a thousand at most.
-- KEYS: counts   ARGV: name, how many more, ...
for i = 1, #ARGV, 2 do add(KEYS[1], ARGV[i], ARGV[i + 1]) end
