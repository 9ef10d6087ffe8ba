-- beat: a replica renews its lease and says how it does.
--
-- KEYS[1] leases   zset   replicas by the end of their lease, ms
-- KEYS[2] reports  hash   replica -> "users sockets"
-- KEYS[3] events   zset   events by when they were last touched, ms; those untouched for 25 h are dropped
-- ARGV[1] replica  text
-- ARGV[2] lease_ms integer 0 gives the lease back
-- ARGV[3] report   text   "users sockets"
--
-- RETURNS
--   {"alive", report, ...}   of every replica whose lease runs, this one's included
--
-- COST O(r) in replicas; 2 + r reads, 5 writes.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local lease = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now - 90000000))
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))) do
  redis.call('ZREM', KEYS[1], gone)
  redis.call('HDEL', KEYS[2], gone)
end
if lease > 0 then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + lease), ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[1], 90000000)
  redis.call('PEXPIRE', KEYS[2], 90000000)
else
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
end
local reply = {'alive'}
for _, report in ipairs(redis.call('HVALS', KEYS[2])) do reply[#reply + 1] = report end
return reply
