-- tell: tell a user's sockets of an order, and keep that for who is between two connections.
--
-- KEYS[1] told     zset    messages by when they were told last, ms: the latest 16
-- ARGV[1] message  text
-- ARGV[2] channel  text    the user's
-- ARGV[3] keep_ms  integer how long it is kept
--
-- RETURNS
--   {"told"}
--
-- COST O(1); 3 writes, 1 publish.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZADD', KEYS[1], string.format('%d', now), ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[1], '0', '-17')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[2], ARGV[1])
return {'told'}
