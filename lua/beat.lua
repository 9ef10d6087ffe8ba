-- beat: a replica renews its lease, says how it does, and learns whether the ledger is the one it knew.
--
-- KEYS[1] leases   zset    replicas by the end of their lease, ms
-- KEYS[2] reports  hash    replica -> "users sockets"
-- KEYS[3] events   zset    events by when they were last touched, ms; those untouched for 25 h are dropped
-- KEYS[4] dead     zset    replicas whose lease ran out, by when their sessions should be looked at, ms
-- KEYS[5] epoch    string  made by the first beat: another one means that the data was lost
-- ARGV[1] replica  text
-- ARGV[2] lease_ms integer 0 gives the lease back
-- ARGV[3] report   text    "users sockets"
-- ARGV[4] epoch    text    used when there is none
--
-- RETURNS
--   {"alive", held, epoch, report, ...}
--     held: 1 when the replica's lease had not run out; reports of every replica whose lease runs, this one's included
--
-- COST O(r) in replicas; 4 + r reads, 7 writes.

local KEEP_MS = 90000000
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local lease = tonumber(ARGV[2])
local held = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) > now and 1 or 0
local epoch = redis.call('GET', KEYS[5]) or ARGV[4]
redis.call('SET', KEYS[5], epoch, 'PX', KEEP_MS)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('%d', now - KEEP_MS))

local function bury(replica)
  redis.call('ZREM', KEYS[1], replica)
  redis.call('HDEL', KEYS[2], replica)
  redis.call('ZADD', KEYS[4], 'NX', string.format('%d', now), replica)
  redis.call('PEXPIRE', KEYS[4], KEEP_MS)
end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now))) do bury(gone) end
if lease > 0 then
  redis.call('ZADD', KEYS[1], string.format('%d', now + lease), ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('PEXPIRE', KEYS[1], KEEP_MS)
  redis.call('PEXPIRE', KEYS[2], KEEP_MS)
else
  -- What its sessions left undone is done by another replica.
  bury(ARGV[1])
end
local reply = {'alive', held, epoch}
for _, report in ipairs(redis.call('HVALS', KEYS[2])) do reply[#reply + 1] = report end
return reply
