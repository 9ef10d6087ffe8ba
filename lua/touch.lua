-- touch: note that an event may soon have something due. Written before the lock, so the index is never too small.
--
-- KEYS[1] due      zset   events by when the sweep should look, ms
-- KEYS[2] events   zset   events by when they were last touched, ms
-- ARGV[1] event    integer
-- ARGV[2] in_ms    integer
--
-- RETURNS
--   {"touched"}
--
-- COST O(log e) in events; 2 writes.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZADD', KEYS[1], 'LT', string.format('%d', now + ARGV[2]), ARGV[1])
redis.call('ZADD', KEYS[2], string.format('%d', now), ARGV[1])
return {'touched'}
