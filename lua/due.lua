-- due: claim what should be looked at now: events by the sweep, dead replicas by whoever is left.
--
-- A claim moves the member a little into the future, so that other replicas pass it by; if the claimer dies, it is due
-- again soon.
--
-- KEYS[1] due       zset   events or replicas by when they should be looked at, ms
-- ARGV[1] limit     integer
-- ARGV[2] claim_ms  integer
--
-- RETURNS
--   {"due", next_ms, claimed_ms, event, ...}
--     next_ms: until the first event that was not claimed is due, -1 when there is none; claimed_ms: the claim's score
--
-- COST O(log e + k) in events and claims; 2 reads, 1 write a claim.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local claimed = string.format('%d', now + ARGV[2])
local events = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'LIMIT', '0', ARGV[1])
for _, event in ipairs(events) do redis.call('ZADD', KEYS[1], claimed, event) end
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local reply = {'due', first[2] and math.max(0, first[2] - now) or -1, tonumber(claimed)}
for _, event in ipairs(events) do reply[#reply + 1] = event end
return reply
