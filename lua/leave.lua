-- leave: a session of the user ended.
--
-- KEYS[1] sessions  hash   session -> replica; "#" -> generation
-- ARGV[1] session   text
--
-- RETURNS
--   {"left", generation, remaining}   remaining: the user's other sessions, on all replicas
--
-- COST O(1); 2 reads, 2 writes.

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
redis.call('HDEL', KEYS[1], ARGV[1])
local generation = math.max(tonumber(redis.call('HGET', KEYS[1], '#') or 0) + 1, now_us)
redis.call('HSET', KEYS[1], '#', string.format('%.0f', generation))
local remaining = redis.call('HLEN', KEYS[1]) - 1
redis.call('PEXPIRE', KEYS[1], remaining > 0 and 604800000 or 90000000)
return {'left', generation, remaining}
