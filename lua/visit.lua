-- visit: note that a user may have locks in an event. Written before the lock, so the index is never too small.
--
-- KEYS[1] events  zset   events by when the user last tried there, ms
-- ARGV[1] event   integer
--
-- RETURNS
--   {"visited"}
--
-- COST O(log e) in the user's events; 3 writes. A user's index keeps the 1,000 latest events.

local clock = redis.call('TIME')
redis.call('ZADD', KEYS[1], string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000)), ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1001)
redis.call('PEXPIRE', KEYS[1], 90000000)
return {'visited'}
