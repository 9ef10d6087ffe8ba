-- enter: a session of the user began, or is still there.
--
-- KEYS[1] user      hash   session -> "replica generation"; "#" -> generation; "e:<event>" -> last try
-- ARGV[1] session   text
-- ARGV[2] replica   text
--
-- RETURNS
--   {"entered", generation, now_ms}   generation: rises with every coming and going, also across loss of all data
--
-- COST O(1); 1 read, 2 writes.

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local generation = string.format('%d', math.max(tonumber(redis.call('HGET', KEYS[1], '#') or 0) + 1, now_us))
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. generation, '#', generation)
redis.call('PEXPIRE', KEYS[1], 604800000)
return {'entered', generation, math.floor(now_us / 1000)}
